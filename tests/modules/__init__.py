"""Modules are tested as on a target, where Ansible packs its own module_utils and the kit's into one."""

import ansible.module_utils

from tests.support import ROOT

ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))
