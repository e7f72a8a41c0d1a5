# The action plugin of this name does the work on the controller; this file documents it for ansible-doc.
from __future__ import annotations

DOCUMENTATION = r"""
module: clusterkit_spec
short_description: Check the inventory and return the cluster
description:
  - Builds the cluster from the variables of all hosts, as Ansible resolved them, and checks it.
  - Fails with every mistake at once, each with its file, line, host and fix. Touches no host.
author:
  - clusterkit
options:
  secrets:
    description: Return what came out of a vault as it is, instead of C(***); only with C(no_log).
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Check the inventory
  clusterkit_spec:
  run_once: true
  register: spec
"""

RETURN = r"""
findings:
  description: Each mistake with C(file), C(line), C(hosts), C(subject), C(problem) and C(fix).
  returned: always
  type: list
  elements: dict
cluster:
  description: The cluster, for the fact C(clusterkit).
  returned: success
  type: dict
blanked:
  description: Whether C(cluster) has C(***) in it.
  returned: success
  type: bool
"""
