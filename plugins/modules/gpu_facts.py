#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_facts
short_description: The GPUs of a host, compared with what is declared
description:
  - Reads AMD and NVIDIA GPUs in one shape and changes nothing, in check mode or not.
  - A difference between declared and seen is a finding, not a failure; the caller decides what follows from it.
  - For plays of a site and `ansible -m gpu_facts`. The gate (role C(gpu_health)) reads through the same library.
author:
  - clusterkit
options:
  expected:
    description: What the inventory declares. What is left out is not compared.
    type: dict
    default: {}
    suboptions:
      count:
        description: How many GPUs.
        type: int
      accelerator_type:
        description: Ray's name of them, such as AMD-Instinct-MI300X-OAM or H100.
        type: str
      model:
        description: The vendor's name of them, or a part of it, such as MI300X.
        type: str
      memory_gib:
        description: >-
          Memory of each in GiB. A tenth less is no difference: products are named in larger numbers than their drivers
          tell, by up to 8 percent.
        type: float
  vendor:
    description: Whose GPUs.
    type: str
    choices: [amd, nvidia, any]
    default: any
  timeout:
    description: Seconds that each call of a vendor's tool may take.
    type: float
    default: 30
"""

EXAMPLES = r"""
- name: Read the GPUs
  gpu_facts:
    vendor: amd
    expected: {count: 8, accelerator_type: AMD-Instinct-MI300X-OAM, memory_gib: 192}
  register: __rocm_host_gpus
"""

RETURN = r"""
gpus:
  description: One entry for each GPU; what is not known is none. The shape stands in C(module_utils/gpus.py).
  returned: always
  type: list
  elements: dict
reason:
  description: Why there are no GPUs.
  returned: always
  type: str
source:
  description: What they were read with, C(amdsmi), C(amd-smi), C(nvidia-smi), two of them joined by a +, or C(none).
  returned: always
  type: str
problems:
  description: What could not be read.
  returned: always
  type: list
  elements: str
findings:
  description: Differences, each with C(check), C(severity), C(subject), C(problem) and C(fix).
  returned: always
  type: list
  elements: dict
"""

import re

from ansible.module_utils import gpus
from ansible.module_utils.basic import AnsibleModule

ROOT = "/"
# Ray's names for a size of the A100; no node announces them by itself (ray/util/accelerators/accelerators.py).
SIZED = {"A100-40G": ("A100", 40), "A100-80G": ("A100", 80)}
# How much less than declared is still the same product: an A10G of 24 GB has 22.2 GiB.
TOLERANCE = 0.1


def finding(check, subject, problem, fix):
    return {"check": check, "severity": "error", "subject": subject, "problem": problem, "fix": fix}


def plan(have, want):
    """Findings where a host's GPUs are not the declared ones.

    have: what gpus.read() returns; want: count, accelerator_type, model, memory_gib, each of them optional.
    """
    seen = have["gpus"]
    return check_count(have, want.get("count")) + [
        item for gpu in seen for item in check_product(gpu, want) + check_memory(gpu, want.get("memory_gib"))
    ]


def check_count(have, wanted):
    seen = have["gpus"]
    if wanted is None or len(seen) == wanted:
        return []
    problem = "%d GPUs are declared, and there are %d" % (wanted, len(seen))
    if not seen:
        problem += ": %s" % have["reason"]
    elif have["problems"]:
        problem += ": %s" % "; ".join(have["problems"][:3])
    if len(seen) > wanted:
        fix = "set clusterkit_gpus to %d, or undo a partitioning that nobody declared" % len(seen)
    elif not seen:
        fix = "install and load the driver and its tools; if the host has no GPU, set clusterkit_gpus to 0"
    else:
        fix = (
            "look for the missing one in `lspci` and `dmesg`; reboot, then reseat it; "
            "or set clusterkit_gpus to %d" % len(seen)
        )
    return [finding("gpu-count", "host", problem, fix)]


def check_product(gpu, want):
    kind, model = want.get("accelerator_type"), want.get("model")
    subject, found = gpus.subject(gpu), gpu["accelerator_type"]
    seen = "%s (Ray: %s)" % (gpu["model"], found or "unknown")
    wrong = []
    base, gib = SIZED.get(kind, (kind, None))
    if kind and found != base:
        wrong.append(kind)
    # `MI300X` is a word of `AMD Instinct MI300X`, and `MI300` is none.
    if model and model != found and not re.search(r"(?<!\w)%s(?!\w)" % re.escape(model), gpu["model"], re.IGNORECASE):
        wrong.append(model)
    findings = [
        finding(
            "gpu-type",
            subject,
            "%s is declared, and it is %s" % (name, seen),
            "set clusterkit_gpu_model to what the host has, or put the host into the pool of its GPUs",
        )
        for name in wrong
    ]
    return findings or (check_memory(gpu, gib) if gib else [])


def check_memory(gpu, wanted):
    have = gpu["memory_mib"]["total"]
    if wanted is None or have is None or have / 1024.0 >= wanted * (1 - TOLERANCE):
        return []
    mode = gpu["partition"]["compute"]
    split = gpu["partition"]["mig"] or mode not in (None, "SPX")
    return [
        finding(
            "gpu-memory",
            gpus.subject(gpu),
            "%g GiB are declared, and it has %.1f" % (wanted, have / 1024.0),
            "undo its partitioning (%s)" % (mode or "MIG")
            if split
            else "set clusterkit_gpu_memory_gib to what it has, or put the host into the pool of its GPUs",
        )
    ]


def main():
    module = AnsibleModule(
        argument_spec={
            "expected": {
                "type": "dict",
                "default": {},
                "options": {
                    "count": {"type": "int"},
                    "accelerator_type": {"type": "str"},
                    "model": {"type": "str"},
                    "memory_gib": {"type": "float"},
                },
            },
            "vendor": {"type": "str", "choices": ["amd", "nvidia", "any"], "default": "any"},
            "timeout": {"type": "float", "default": gpus.TIMEOUT_S},
        },
        supports_check_mode=True,
    )
    given = module.params
    found = gpus.read(root=ROOT, vendor=given["vendor"], timeout=given["timeout"])
    module.exit_json(changed=False, findings=plan(found, given["expected"]), **found)


if __name__ == "__main__":
    main()
