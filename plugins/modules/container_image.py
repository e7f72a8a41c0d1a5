#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: container_image
short_description: The engine's image in a host's Docker
description:
  - Reads which images of the engine a host has, loads an archive or pulls a reference, and lets the local name
    that Ray's launcher uses point to the right one. Older images of the kit's that nobody needs go.
  - As a task it runs through the action plugin of the same name, which builds the image (or has it built) and
    brings the archive to a host that lacks it.
author:
  - clusterkit
options:
  state:
    description: C(info) only reads.
    type: str
    choices: [info, present, absent]
    default: present
  name:
    description: The local name that has to point to the image.
    type: str
    required: true
  inputs:
    description: The digest of what the image is to be made from; the label C(clusterkit.inputs) carries it.
    type: str
    default: ""
  tag:
    description: The image to have.
    type: str
    default: ""
  archive:
    description: A file of C(docker save) on this host that holds C(tag).
    type: path
  pull:
    description: What to pull where C(tag) is missing, best by digest; it gets that tag then.
    type: str
    default: ""
  parts:
    description:
      - Images of the first layers of C(pull), pulled at the same time. dockerd forgets the layers of a pull that
        failed; what a finished part holds stays for the next one. They go once the image is there.
    type: list
    elements: str
    default: []
  keep:
    description:
      - How many images of the engine stay beside the one that the name points to, the newest first; not given, all.
      - Counted are those with the label C(clusterkit.image) whose names are all of the repository of C(name), or of
        one that begins with it and a dash, behind a registry's name or none. One that a container has always stays.
    type: int
  docker:
    description: The docker client.
    type: str
    default: docker
"""

EXAMPLES = r"""
- name: Let the engine's name point to an image of the site's own
  container_image:
    name: clusterkit/vllm:current
    tag: registry.example/vllm@sha256:...
    pull: registry.example/vllm@sha256:...
"""

RETURN = r"""
image:
  description: Id of the image that the name points to.
  returned: always
  type: str
tag:
  description: Tag of the image with the wanted inputs, empty where there is none.
  returned: always
  type: str
current:
  description: Whether the name points to the image with the wanted inputs.
  returned: state is info
  type: bool
prunable:
  description: Names of the images that C(keep) leaves no place for.
  returned: state is info
  type: list
  elements: str
removed:
  description: Names of the images that went, or would.
  returned: state is present or absent
  type: list
  elements: str
machine:
  description: Architecture of the host.
  returned: always
  type: str
"""

import json
import platform
import re
import subprocess

from ansible.module_utils.basic import AnsibleModule

LABEL = "clusterkit.image"
PART = "part"
# What Docker says, and what it means; the first that fits.
FULL = (
    r"no space left on device",
    "the disk that Docker keeps images on is full: free some (docker system df), or move them to another "
    "(container_engine_data_root)",
)
LOADING = (
    FULL,
    (
        r"EOF|archive/tar|invalid|no such file",
        "the archive came damaged: run again; where it is so on the controller (clusterkit image plan says where it "
        "lies), delete it, and it is made anew",
    ),
)
# %(from)s: the registry. %(layer)s: a layer's digest.
PULLING = (
    FULL,
    (
        r"verification failed for digest|unexpected commit digest|failed commit on ref|digest mismatch",
        "a layer is damaged in %(from)s, and nothing of it is used. On its host, take it away below registry_storage: "
        "rm -r docker/registry/v2/blobs/sha256/%(short)s/%(layer)s, and run again: it is pushed anew",
    ),
    (
        r"x509|certificate",
        "this host does not trust the certificate of %(from)s: run with --tags registry,container_engine, which puts "
        "it into /etc/docker/certs.d",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        "%(from)s speaks no TLS: declare that (registry_tls: false, or container_engine_insecure_registries)",
    ),
    (
        r"(?i)connection refused|no route to host|timeout|deadline exceeded|unreachable|no such host|reset by peer|EOF",
        "%(from)s does not answer this host, or stopped in the middle: is it up (systemctl status docker-registry, on "
        "its host), does a firewall stand between? Run again: what was finished does not move again",
    ),
    (r"(?i)manifest unknown|not found", "%(from)s does not have it: push it (clusterkit image push), or mend its name"),
    (r"(?i)unauthorized|denied", "%(from)s wants a login: docker login, as root on this host"),
)


class Docker:
    def __init__(self, module):
        self.module = module
        self.client = module.params["docker"]

    def ask(self, *words):
        try:
            return self.module.run_command([self.client] + list(words), handle_exceptions=False)
        except OSError as error:
            return 127, "", "%s: %s" % (self.client, error.strerror)

    def must(self, problem, *words):
        code, out, err = self.ask(*words)
        if code != 0:
            self.module.fail_json(msg="%s: %s" % (problem, (err or out).strip()[-800:]))
        return out

    def inspect(self, name):
        """{"Id", "RepoTags", "Config"} of an image, or None where there is none."""
        code, out, err = self.ask("image", "inspect", name)
        if code == 0:
            return json.loads(out)[0]
        if code != 127 and "No such image" not in err:
            self.module.fail_json(msg="Docker does not answer: %s" % err.strip()[-500:])
        return None

    def images(self, but=None):
        """Every image of the engine; none where `but` is the only one."""
        code, out, err = self.ask("image", "ls", "--quiet", "--no-trunc", "--filter", "label=%s" % LABEL)
        if code == 127:
            return []
        if code != 0:
            self.module.fail_json(msg="Docker does not answer: %s" % err.strip()[-500:])
        ids = list(dict.fromkeys(out.split()))
        if not set(ids) - {but}:
            return []
        # All in one call: each costs as much as the whole rest.
        return json.loads(self.must("the images could not be read", "image", "inspect", *ids))

    def used(self):
        """Ids of the images that containers were made from, whether they run or not."""
        containers = self.must("the containers could not be read", "ps", "--all", "--quiet", "--no-trunc").split()
        if not containers:
            return set()
        code, out, err = self.ask("container", "inspect", "--format", "{{.Image}}", *containers)
        # One that went meanwhile needs no image.
        if code != 0 and "No such container" not in err:
            self.module.fail_json(msg="the containers could not be read: %s" % err.strip()[-500:])
        return set(out.split())

    def prunable(self, name, current, keep):
        """The images that may go; current: the id of the one that the name points to, or will."""
        if keep is None:
            return []
        found = spare(self.images(but=current), name, current, keep)
        used = self.used() if found else set()
        return [image for image in found if image["Id"] not in used]

    def drop(self, images):
        """Take images away by all their names. Never by force: one that a container has got meanwhile stays."""
        names = names_of(images)
        if not names:
            return
        code, _out, err = self.ask("image", "rm", *names)
        # With its last tag a digest of the same repository goes too, and is then not found.
        said = [line for line in err.splitlines() if "No such image" not in line]
        if code != 0 and said:
            self.module.fail_json(msg="older images could not be removed: %s" % "; ".join(said)[-800:])

    def fetch(self, source, parts):
        """Pull an image, and its parts at the same time: dockerd brings each layer once for all."""
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        beside = [subprocess.Popen([self.client, "pull", "--quiet", part], **quiet) for part in parts]
        code, out, err = self.ask("pull", "--quiet", source)
        # Where a later layer failed, these may still finish.
        for running in beside:
            running.wait()
        if code != 0:
            self.module.fail_json(msg="%s could not be pulled: %s" % (source, explained(err or out, PULLING, source)))


def explained(said, meanings, source=""):
    """Docker's words, with what they mean and what to do. source: what was pulled."""
    words = said.strip()[-800:]
    layer = re.search(r"sha256:([0-9a-f]{64})", words.replace(source, "") if source else words)
    known = {"from": "the registry %s" % source.split("/")[0], "layer": "...", "short": "..."}
    if layer:
        known.update(layer=layer.group(1), short=layer.group(1)[:2])
    for pattern, meaning in meanings:
        if re.search(pattern, words):
            return "%s. Fix: %s" % (words, meaning % known)
    return words


def names_of(images):
    """Every name of the images, tags before digests."""
    tags = [tag for image in images for tag in image.get("RepoTags") or []]
    return tags + [digest for image in images for digest in image.get("RepoDigests") or []]


def ours(image, name):
    """Whether all its names are of the kit's repositories; one with a name of the site's own is the site's."""
    repository = re.escape(name.rpartition(":")[0])
    pattern = r"(?:[^/]+/)?%s(?:-[\w.-]+)?[:@]" % repository
    names = names_of([image])
    return bool(names) and all(re.match(pattern, each) for each in names)


def spare(images, name, current, keep):
    """Images of the kit's beyond the newest `keep`, and parts that a pull that was cut has left."""
    others = [image for image in images if image["Id"] != current and ours(image, name)]
    parts = [image for image in others if ((image["Config"].get("Labels")) or {}).get(LABEL) == PART]
    whole = [image for image in others if image not in parts]
    whole.sort(key=lambda image: image.get("Created") or "", reverse=True)
    return parts + whole[keep:]


def chosen(images, inputs, name):
    """The image with these inputs, and the tag that names it by content: the one in use first."""
    fitting = [image for image in images if ((image["Config"].get("Labels")) or {}).get("clusterkit.inputs") == inputs]
    fitting.sort(key=lambda image: name not in (image.get("RepoTags") or []))
    for image in fitting:
        tags = [tag for tag in image.get("RepoTags") or [] if tag != name]
        if tags:
            return image["Id"], tags[0]
    return "", ""


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["info", "present", "absent"], "default": "present"},
            "name": {"type": "str", "required": True},
            "inputs": {"type": "str", "default": ""},
            "tag": {"type": "str", "default": ""},
            "archive": {"type": "path"},
            "pull": {"type": "str", "default": ""},
            "parts": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "int"},
            "docker": {"type": "str", "default": "docker"},
        },
        supports_check_mode=True,
    )
    params, docker = module.params, Docker(module)
    result = {"machine": platform.machine()}
    current = docker.inspect(params["name"])
    result["image"] = current["Id"] if current else ""
    if params["state"] == "info":
        wanted, result["tag"] = "", ""
        if params["inputs"]:
            # The one in use first: where it fits, the engine is asked once and no more.
            wanted, result["tag"] = chosen([current] if current else [], params["inputs"], params["name"])
            if not wanted:
                wanted, result["tag"] = chosen(docker.images(), params["inputs"], params["name"])
        is_current = bool(wanted) and wanted == result["image"]
        # Before the right one is there, nothing is to go.
        spare_ones = docker.prunable(params["name"], wanted, params["keep"]) if is_current else []
        module.exit_json(changed=False, current=is_current, prunable=names_of(spare_ones), **result)
    if params["state"] == "absent":
        found = docker.images()
        if current and params["name"] not in names_of(found):
            found.append({"RepoTags": [params["name"]]})
        names = names_of(found)
        if names and not module.check_mode:
            docker.drop(found)
        module.exit_json(changed=bool(names), removed=names, **result)
    tag = params["tag"]
    wanted = docker.inspect(tag)
    changed = wanted is None or result["image"] != wanted["Id"]
    result["tag"] = tag
    changes, before, after = [], "", ""
    if changed:
        before = "%s is %s\n" % (params["name"], result["image"] or "missing")
        after = "%s is %s\n" % (params["name"], (wanted["Id"] if wanted else tag))
        change = {"what": "image", "name": params["name"], "wanted": wanted["Id"] if wanted else tag}
        change["actual"] = result["image"] or "missing"
        # A node runs on from the old image until it is restarted.
        changes.append(dict(change, disrupts=["node"] if result["image"] else []))
    if changed and not module.check_mode:
        if wanted is None:
            bring(docker, params)
            wanted = docker.inspect(tag)
        if wanted is None:
            module.fail_json(msg="the image %s is not on this host after all" % tag)
        # At the end: the name never points to anything that is not whole.
        docker.must("the image could not be named", "tag", tag, params["name"])
        result["image"] = wanted["Id"]
    gone = docker.prunable(params["name"], wanted["Id"] if wanted else "", params["keep"])
    for image in gone:
        label = names_of([image])[0]
        changes.append({"what": "image", "name": label, "wanted": "absent", "actual": image["Id"]})
        before += "%s is %s\n" % (label, image["Id"])
    if not module.check_mode:
        docker.drop(gone)
    if changes:
        result.update(diff={"before": before, "after": after}, changes=changes)
    module.exit_json(changed=bool(changes), removed=names_of(gone), **result)


def bring(docker, params):
    """Load or pull the image; it has its tag then."""
    if params["archive"]:
        code, out, err = docker.ask("load", "--quiet", "--input", params["archive"])
        if code != 0:
            docker.module.fail_json(msg="the image could not be loaded: %s" % explained(err or out, LOADING))
    elif params["pull"]:
        docker.fetch(params["pull"], params["parts"])
        if params["pull"] != params["tag"]:
            docker.must("the image could not be named", "tag", params["pull"], params["tag"])


if __name__ == "__main__":
    main()
