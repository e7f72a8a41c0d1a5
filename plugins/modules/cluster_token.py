#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: cluster_token
short_description: The cluster's token on the head, made once
description:
  - Makes a random token of 32 bytes, as 64 hexadecimal digits, where there is none; never returns it.
  - Holds owner and mode 0600.
author:
  - clusterkit
options:
  path:
    description: Where the token lies. Its folder has to be there.
    type: path
    required: true
  owner:
    description: The user that runs Ray.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Make the token
  cluster_token:
    path: /var/lib/clusterkit/node/token
    owner: ray
"""

RETURN = r"""
made:
  description: Whether the token was made now.
  returned: always
  type: bool
"""

import os
import pwd
import secrets
import stat

from ansible.module_utils.basic import AnsibleModule


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True, "no_log": False},
            "owner": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]
    made = not os.path.exists(path) or os.path.getsize(path) == 0
    if module.check_mode:
        change = {"what": "secret", "name": path, "wanted": "made once", "actual": "missing"}
        module.exit_json(changed=made, made=made, changes=[change] if made else [])
    try:
        uid = pwd.getpwnam(module.params["owner"]).pw_uid
        if made:
            # Opened with its final mode, and named when it is whole: at no moment readable for others, never half.
            partial = path + ".new"
            if os.path.lexists(partial):
                os.unlink(partial)
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            os.write(handle, secrets.token_hex(32).encode())
            os.fsync(handle)
            os.close(handle)
            os.replace(partial, path)
        state = os.lstat(path)
        wrong = state.st_uid != uid or stat.S_IMODE(state.st_mode) != 0o600
        if wrong:
            os.chown(path, uid, -1, follow_symlinks=False)
            os.chmod(path, 0o600)
    except KeyError:
        module.fail_json(msg="there is no user %s on this host: the role baseline makes it" % module.params["owner"])
    except OSError as error:
        module.fail_json(msg="the token %s cannot be made: %s" % (path, error.strerror))
    module.exit_json(changed=made or wrong, made=made)


if __name__ == "__main__":
    main()
