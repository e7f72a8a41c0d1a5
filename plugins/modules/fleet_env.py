# The action plugin of this name does the work; this file documents it for ansible-doc.
from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_env
short_description: The fleet daemon's own Python environment on the head
description:
  - Takes the first interpreter of I(pythons) that the kit's own C(requires-python) allows, resolves on the controller
    what C(pyproject.toml) names for the daemon, and lets the module C(ray_env) make the environment, from an index or
    a wheelhouse.
  - The daemon itself comes as a wheel of the kit that is written here, without a build, an index or a compiler. Its
    version ends with a digest of its files, so another daemon is another version.
author:
  - clusterkit
options:
  path:
    description: Where the environment lies.
    type: path
    required: true
  pythons:
    description: Interpreters to try, as paths or names on PATH.
    type: list
    elements: str
    required: true
  redfish:
    description: Whether hosts are switched by Redfish, which takes C(sushy).
    type: bool
    required: true
  source:
    description: Where the wheels come from.
    type: str
    choices: [index, wheelhouse]
    required: true
  index_url:
    description: The index; pip's own configuration where it is empty.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Make the daemon's environment
  fleet_env:
    path: /opt/clusterkit/fleet-env
    pythons: [python3]
    redfish: false
    source: index
    index_url: ""
"""

RETURN = r"""
changes:
  description: What differs, each with C(what), C(name), C(wanted) and C(actual).
  returned: success
  type: list
  elements: dict
"""
