#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: container_image
short_description: The engine's image in a host's Docker
description:
  - Reads which images of the engine a host has, loads an archive or pulls a reference, and lets the local name
    that Ray's launcher uses point to the right one.
  - As a task it runs through the action plugin of the same name, which builds the image on the controller and
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
    description: Whether to pull C(tag) where it is missing.
    type: bool
    default: false
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
    pull: true
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
machine:
  description: Architecture of the host.
  returned: always
  type: str
"""

import json
import platform

from ansible.module_utils.basic import AnsibleModule

LABEL = "clusterkit.image"


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

    def images(self):
        """Every image of the engine, newest first."""
        code, out, err = self.ask("image", "ls", "--quiet", "--no-trunc", "--filter", "label=%s" % LABEL)
        if code == 127:
            return []
        if code != 0:
            self.module.fail_json(msg="Docker does not answer: %s" % err.strip()[-500:])
        ids = list(dict.fromkeys(out.split()))
        if not ids:
            return []
        # All in one call: each costs as much as the whole rest.
        return json.loads(self.must("the images could not be read", "image", "inspect", *ids))


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
            "pull": {"type": "bool", "default": False},
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
        module.exit_json(changed=False, current=bool(wanted) and wanted == result["image"], **result)
    if params["state"] == "absent":
        names = sorted({tag for image in docker.images() for tag in image.get("RepoTags") or []})
        names += [params["name"]] if current and params["name"] not in names else []
        if names and not module.check_mode:
            docker.must("the images could not be removed", "image", "rm", *names)
        module.exit_json(changed=bool(names), removed=names, **result)
    tag = params["tag"]
    wanted = docker.inspect(tag)
    changed = wanted is None or result["image"] != wanted["Id"]
    result["tag"] = tag
    if changed:
        result["diff"] = {
            "before": "%s is %s\n" % (params["name"], result["image"] or "missing"),
            "after": "%s is %s\n" % (params["name"], (wanted["Id"] if wanted else tag)),
        }
        change = {"what": "image", "name": params["name"], "wanted": wanted["Id"] if wanted else tag}
        change["actual"] = result["image"] or "missing"
        # A node runs on from the old image until it is restarted.
        result["changes"] = [dict(change, disrupts=["node"] if result["image"] else [])]
    if changed and not module.check_mode:
        if wanted is None and params["archive"]:
            docker.must("the image could not be loaded", "load", "--quiet", "--input", params["archive"])
        elif wanted is None and params["pull"]:
            docker.must("%s could not be pulled" % tag, "pull", "--quiet", tag)
        wanted = docker.inspect(tag)
        if wanted is None:
            module.fail_json(msg="the image %s is not on this host after all" % tag)
        docker.must("the image could not be named", "tag", tag, params["name"])
        result["image"] = wanted["Id"]
    module.exit_json(changed=changed, **result)


if __name__ == "__main__":
    main()
