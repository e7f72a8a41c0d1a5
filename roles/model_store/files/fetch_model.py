#!/usr/bin/env python3
"""Fetch a repository of the Hugging Face Hub, or of a mirror that speaks its API, into a folder.

fetch_model.py < request.json

Needs the library huggingface_hub (0.34 or later), which the engine brings, and Python 3.9. The request stands on
stdin because a token may be in it: nobody else can read it there. What is fetched lies in `.<name>.part` beside the
folder until it is complete and its digests agree with the repository's; then it is renamed. A run that was killed
leaves that folder, and the next one goes on with it. Prints one JSON object on stdout; exit codes: 0 done, 1 not.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import ssl
import sys

MANIFEST = "clusterkit-manifest.json"
SMALL = 1 << 26
DEFAULT_ENDPOINT = "https://huggingface.co"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# Nothing that vLLM reads; some repositories hold the same weights three times over.
OTHER_FORMATS = (
    ".gitattributes",
    "*.h5",
    "*.mlmodel",
    "*.mlpackage/*",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.tflite",
    "original/*",
)
# Copies of what stands in *.safetensors.
COPIES = ("*.bin", "*.pt", "*.pth", "*.gguf")
NETWORK = re.compile(r"Connect|Timeout|Proxy|SSL|ReadError|Protocol|ChunkedEncoding|Network|OfflineMode|MaxRetry")
# What huggingface_hub 2 leaves of a killed run is named at random and never read again.
LITTER = re.compile(r"\.[0-9a-f]{8}\.incomplete$")


class Problem(Exception):
    """It cannot be done; the message says what to do."""


# --------------------------------------------------------------------------- what is wanted


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def chosen(names, request):
    """The files of a repository that this host needs."""
    if request["allow_patterns"]:
        names = [name for name in names if matches(name, request["allow_patterns"])]
    else:
        copies = COPIES if any(name.endswith(".safetensors") for name in names) else ()
        names = [name for name in names if not matches(name, OTHER_FORMATS + copies)]
    names = [name for name in names if not matches(name, request["ignore_patterns"])]
    if request["weights"]:
        if not any(matches(name, WEIGHTS) for name in names):
            raise Problem(
                "%s at %s has no weights among the %d files that were chosen (%s): see allow_patterns and "
                "ignore_patterns" % (request["hub"], request["revision"], len(names), ", ".join(WEIGHTS))
            )
        return names
    return [name for name in names if not matches(name, WEIGHTS)]


def read_manifest(folder, request):
    """The manifest of what was fetched before, where it is of this repository and revision."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as handle:
            manifest = json.load(handle)
        same = all(manifest[key] == request[key] for key in ("hub", "revision"))
        return manifest if same and isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --------------------------------------------------------------------------- files


def gib(size):
    return "%.2f GiB" % (size / 1024.0**3)


def size_of(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def digests_of(path):
    """(SHA-256, git's name of the content); the file is on the disk when this returns."""
    size = os.path.getsize(path)
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 22), b""):
            sha256.update(block)
            if size < SMALL:
                git.update(block)
        os.fsync(handle.fileno())
    return sha256.hexdigest(), git.hexdigest()


def link_known(manifest, folder, work, wanted, broken):
    """What lies in the old folder intact need not come again: the same file under a second name. {name: SHA-256}"""
    known = {}
    for name, about in manifest["files"].items():
        old, new = os.path.join(folder, name), os.path.join(work, name)
        if name not in wanted or name in broken or size_of(old) != about["size"]:
            continue
        if os.path.lexists(new):
            os.unlink(new)
        os.makedirs(os.path.dirname(new), exist_ok=True)
        os.link(old, new)
        known[name] = about["sha256"]
    return known


def unused_folders(parent, in_use):
    """What was fetched before and no app of this host names: [(size, path)], the largest first."""
    found = []
    for entry in os.scandir(parent):
        if entry.path in in_use or not os.path.exists(os.path.join(entry.path, MANIFEST)):
            continue
        size = sum(size_of(os.path.join(base, name)) or 0 for base, _, names in os.walk(entry.path) for name in names)
        found.append((size, entry.path))
    return sorted(found, reverse=True)


def check_room(parent, need, request):
    state = os.statvfs(parent)
    free = state.f_bavail * state.f_frsize
    if need <= free:
        return
    unused = ["%s (%s)" % (path, gib(size)) for size, path in unused_folders(parent, request["in_use"])]
    told = "; no app of this host uses %s any more" % ", ".join(unused) if unused else ""
    raise Problem(
        "the disk of %s is too small: %s at %s needs %s more, and %s are free. Free some, or let "
        "clusterkit_paths.models name a larger disk%s"
        % (parent, request["hub"], request["revision"], gib(need), gib(free), told)
    )


def clean(work, wanted):
    """Away with what is no file of the model: the library's own records, and files of another commit."""
    shutil.rmtree(os.path.join(work, ".cache"), ignore_errors=True)
    for base, folders, names in os.walk(work, topdown=False):
        for name in names:
            path = os.path.join(base, name)
            if os.path.relpath(path, work) not in wanted:
                os.unlink(path)
            else:
                os.chmod(path, 0o644)
        for name in folders:
            path = os.path.join(base, name)
            if not os.listdir(path):
                os.rmdir(path)
            else:
                os.chmod(path, 0o755)
    os.chmod(work, 0o755)


def sweep_litter(work):
    for base, _, names in os.walk(os.path.join(work, ".cache")):
        for name in names:
            if LITTER.search(name):
                os.unlink(os.path.join(base, name))


def put_in_place(work, out):
    """A rename cannot fall on a folder that is not empty: the old one goes aside first."""
    old = work + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.lexists(out):
        os.rename(out, old)
    os.rename(work, out)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------- the network


def set_environment(request, work):
    """Before the library is imported: it reads all this only then."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    os.environ.update(
        HF_ENDPOINT=request["endpoint"] or DEFAULT_ENDPOINT,
        HF_HOME=os.path.join(work, ".cache", "home"),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    )
    if request["authorities"]:
        path = bundle(request, work)
        os.environ.update(SSL_CERT_FILE=path, REQUESTS_CA_BUNDLE=path, CURL_CA_BUNDLE=path)


def bundle(request, work):
    """The site's authorities besides the public ones, in a file: in the engine's image there are only the latter."""
    texts = [request["authorities"]]
    paths = [ssl.get_default_verify_paths().cafile]
    try:
        import certifi

        paths.append(certifi.where())
    except ImportError:
        pass
    for path in paths:
        if path and os.path.exists(path):
            with open(path, encoding="utf-8") as handle:
                texts.append(handle.read())
            break
    path = os.path.join(work, ".cache", "authorities.pem")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        handle.write("\n".join(texts))
    return path


def causes(error):
    """An error and what it came from, outermost first."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def explain(error, request):
    """What went wrong, and what to do, in one line."""
    chain = causes(error)
    names = [kind.__name__ for item in chain for kind in type(item).__mro__]
    statuses = [getattr(getattr(item, "response", None), "status_code", None) for item in chain]
    status = next((code for code in statuses if code), None)
    about = {
        "where": request["endpoint"] or DEFAULT_ENDPOINT,
        "hub": request["hub"],
        "revision": request["revision"],
        "given": "the token of model_store_token" if request["token"] else "no token",
        "status": status,
        "kind": type(error).__name__,
        "last": " ".join(str(chain[-1]).split())[:300],
    }
    if any(getattr(item, "errno", None) == errno.ENOSPC or "No space left" in str(item) for item in chain):
        text = "the disk became full while %(hub)s was fetched; what came is kept. Free some space and run again"
    elif "GatedRepoError" in names or status == 403:
        text = (
            "%(hub)s is gated, and closed to %(given)s: ask for access at %(where)s/%(hub)s, and set model_store_token "
            "in the vault to a token of the account that has it"
        )
    elif "RevisionNotFoundError" in names:
        text = "%(hub)s has no revision %(revision)s: see %(where)s/%(hub)s/commits/main"
    elif status == 401 and request["token"]:
        text = "%(where)s refuses the token of model_store_token (401): make a new one with read access"
    elif status == 401 or "RepositoryNotFoundError" in names:
        text = (
            "%(where)s shows no repository %(hub)s to %(given)s: correct the name; where it is private, set "
            "model_store_token in the vault to a token that may read it"
        )
    elif status is not None:
        text = "%(where)s answered %(status)s for %(hub)s at %(revision)s: %(last)s"
    elif any(NETWORK.search(name) for name in names):
        text = (
            "%(where)s cannot be reached for %(hub)s (%(last)s): check clusterkit_mirrors.huggingface and "
            "clusterkit_proxy; what came before is kept, and the next run goes on"
        )
    elif any("JSON" in name for name in names):
        text = "%(where)s does not answer like the Hub: correct clusterkit_mirrors.huggingface"
    else:
        text = "%(hub)s at %(revision)s could not be fetched: %(kind)s: %(last)s"
    return text % about


def differs(path, sibling):
    """(does a file differ from what the repository says of it, its SHA-256)"""
    sha256, git = digests_of(path)
    if sibling.lfs:
        return sha256 != sibling.lfs["sha256"], sha256
    # Small files have git's own name of their content, where the server tells it.
    small = sibling.blob_id and sibling.size is not None and sibling.size < SMALL
    return bool(small and git != sibling.blob_id), sha256


def download(request, work, commit, names):
    from huggingface_hub import snapshot_download

    snapshot_download(
        repo_id=request["hub"],
        revision=commit,
        local_dir=work,
        allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names],
        token=request["token"] or False,
    )


def fetch(request, work):
    from huggingface_hub import HfApi

    out = request["out"]
    parent = os.path.dirname(out)
    old = read_manifest(out, request)
    api = HfApi(token=request["token"] or False)
    # A branch may have moved on since; what is there is completed, not mixed.
    revision = old["commit"] if old else request["revision"]
    info = api.model_info(request["hub"], revision=revision, files_metadata=True, timeout=60)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    names = chosen(sorted(siblings), request)
    bad = [name for name in names if name.startswith("/") or ".." in name.split("/") or name == MANIFEST]
    if bad:
        raise Problem("%s has a file with a name that is not taken: %s" % (request["hub"], bad[0]))
    sweep_litter(work)
    known = link_known(old, out, work, names, request["broken"]) if old else {}
    coming = [name for name in names if name not in known]
    need = sum(siblings[name].size or 0 for name in coming if size_of(os.path.join(work, name)) != siblings[name].size)
    check_room(parent, need, request)
    # A file that came damaged is fetched once more.
    for last in (False, True):
        if coming:
            download(request, work, info.sha, coming)
        again = []
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            looked = {name: pool.submit(differs, os.path.join(work, name), siblings[name]) for name in coming}
            for name, look in looked.items():
                other, known[name] = look.result()
                again += [name] if other else []
        for name in again:
            os.unlink(os.path.join(work, name))
        if again and last:
            raise Problem(
                "%s gives other bytes than it announces for %s of %s: the mirror is damaged, or the way to it"
                % (request["endpoint"] or DEFAULT_ENDPOINT, ", ".join(again[:5]), request["hub"])
            )
        coming = again
    clean(work, set(names))
    sizes = {name: os.path.getsize(os.path.join(work, name)) for name in names}
    write_manifest(request, work, info.sha, {name: {"size": sizes[name], "sha256": known[name]} for name in names})
    put_in_place(work, out)
    return {"ok": True, "commit": info.sha, "bytes": need, "files": len(names)}


def write_manifest(request, work, commit, files):
    keys = ("hub", "revision", "allow_patterns", "ignore_patterns", "weights")
    manifest = dict({key: request[key] for key in keys}, commit=commit, files=files)
    with open(os.path.join(work, MANIFEST), "w", encoding="utf-8") as handle:
        json.dump(manifest, handle, indent=1, sort_keys=True)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.chmod(os.path.join(work, MANIFEST), 0o644)


def answer_to(request):
    parent, name = os.path.split(request["out"])
    work = os.path.join(parent, ".%s.part" % name)
    lock = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # A run that was cut off may still be at it, and has half of it already.
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.umask(0o022)
        os.makedirs(work, exist_ok=True)
        set_environment(request, work)
        return fetch(request, work)
    except Problem as problem:
        return {"ok": False, "problem": str(problem)}
    except ImportError as error:
        return {"ok": False, "problem": "%s has no huggingface_hub: %s" % (sys.executable, error)}
    except Exception as error:  # the library's errors have many bases, and none is common to all its versions
        return {"ok": False, "problem": explain(error, request)}
    finally:
        os.close(lock)


def main():
    request = json.load(sys.stdin)
    answer = answer_to(request)
    text = json.dumps(answer)
    if request["token"]:
        text = text.replace(request["token"], "***")
    print(text)
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
