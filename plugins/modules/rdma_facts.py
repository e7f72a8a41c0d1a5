#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: rdma_facts
short_description: RDMA devices of a host, and what RCCL, NCCL and Gloo have to know of them
description:
  - Reads devices, ports and GIDs from C(/sys/class/infiniband), interfaces from C(/sys/class/net) and their
    addresses from C(ip); compares them with what the inventory declares. Changes nothing.
  - The GID index is looked up in the kernel's own table, for an address that the interface really has. It is never
    assumed, it differs between drivers, firmware and the order in which addresses came.
author:
  - clusterkit
options:
  interface:
    description: The fabric interface that the inventory declares; empty where it declares none.
    type: str
    default: ""
  devices:
    description: RDMA devices that carry the fabric; empty for those of the fastest ports of one vendor.
    type: list
    elements: str
    default: []
  required:
    description: Whether a host without any usable RDMA port is an error. Else one without devices is no matter, and
      one whose ports are not usable is warned of.
    type: bool
    default: false
  root:
    description: What C(/sys), C(/etc) and so on lie below.
    type: path
    default: /
"""

EXAMPLES = r"""
- name: Read the RDMA devices
  rdma_facts:
    interface: bond0
  register: __rdma_fabric_read
"""

RETURN = r"""
distribution:
  description: ID and ID_LIKE of os-release, the nearest first.
  returned: always
  type: list
  elements: str
devices:
  description: Each with name, family, driver, firmware, and ports with state, rate, link layer, interfaces and GIDs.
  returned: always
  type: list
  elements: dict
fabric:
  description: >-
    C(family), C(interface), C(hcas) (as C(device:port)) and C(gid_index) that the ports of the fabric have in common;
    null or empty is what could not be found.
  returned: always
  type: dict
findings:
  description: Each with C(check), C(severity), C(subject), C(problem) and C(fix).
  returned: always
  type: list
  elements: dict
"""

import ipaddress
import json
import os
import re
import subprocess

from ansible.module_utils.basic import AnsibleModule

# By the kernel driver that the device belongs to; the PCI driver's name is not always that of the RDMA driver.
FAMILIES = {
    "mlx5_core": "mlx5",
    "mlx5_ib": "mlx5",
    "bnxt_en": "bnxt_re",
    "bnxt_re": "bnxt_re",
    "ionic": "ionic",
    "ionic_rdma": "ionic",
}
# Documentation/ABI/stable/sysfs-class-infiniband of the kernel: names of types in gid_attrs.
ROCE_V2 = "RoCE v2"
IP_TIMEOUT_S = 20


# --------------------------------------------------------------------------- reading


def text_of(*parts):
    """A file's text; None where there is none, or where the kernel refuses (an unused GID does)."""
    try:
        with open(os.path.join(*parts), encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return None


def names_in(*parts):
    """Names in a folder, numbers in their order."""
    try:
        found = os.listdir(os.path.join(*parts))
    except OSError:
        return []
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def link_name(*parts):
    path = os.path.join(*parts)
    return os.path.basename(os.readlink(path)) if os.path.islink(path) else None


def word(text):
    """`4: ACTIVE` as `ACTIVE`."""
    return text.partition(":")[2].strip() or None if text else None


def number(text):
    """The number that a text begins with (`400 Gb/sec (4X NDR)`), or None."""
    match = re.match(r"\d+(\.\d+)?", text or "")
    if not match:
        return None
    return float(match.group()) if match.group(1) else int(match.group())


def read_gids(port):
    """[{index, address, type, interface}] of the entries that are in use."""
    found = []
    for name in names_in(port, "gids"):
        try:
            address = ipaddress.IPv6Address(text_of(port, "gids", name) or "::")
        except ValueError:
            continue
        if int(address) == 0 or not name.isdigit():
            continue
        found.append(
            {
                "index": int(name),
                "address": str(address.ipv4_mapped or address),
                "type": text_of(port, "gid_attrs", "types", name),
                "interface": text_of(port, "gid_attrs", "ndevs", name),
            }
        )
    return found


def read_port(path, name):
    gids = read_gids(path)
    return {
        "port": int(name),
        "state": word(text_of(path, "state")),
        "physical": word(text_of(path, "phys_state")),
        "rate_gbps": number(text_of(path, "rate")),
        "link_layer": text_of(path, "link_layer"),
        "interfaces": sorted({gid["interface"] for gid in gids if gid["interface"]}),
        "gids": gids,
    }


def read_device(root, name):
    path = os.path.join(root, "sys/class/infiniband", name)
    driver = link_name(path, "device", "driver")
    prefix = next((family for family in sorted(set(FAMILIES.values())) if name.startswith(family)), None)
    ports = [port for port in names_in(path, "ports") if port.isdigit()]
    return {
        "name": name,
        "driver": driver,
        # Devices can be renamed by udev, so the driver comes first.
        "family": FAMILIES.get(driver) or (prefix if driver is None else None) or driver or "other",
        "firmware": text_of(path, "fw_ver") or None,
        "ports": [read_port(os.path.join(path, "ports", port), port) for port in ports],
    }


def read_interfaces(root):
    """{name: {up, mtu}}; `unknown` is what a driver says that does not tell."""
    found = {}
    for name in names_in(root, "sys/class/net"):
        folder = os.path.join(root, "sys/class/net", name)
        if os.path.isdir(folder):
            up = text_of(folder, "operstate") in ("up", "unknown")
            found[name] = {"up": up, "mtu": number(text_of(folder, "mtu"))}
    return found


def run_ip():
    """(exit code, stdout, stderr) of `ip -json address`."""
    try:
        done = subprocess.run(
            ["ip", "-json", "address", "show"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=IP_TIMEOUT_S,
        )
    except FileNotFoundError:
        return 127, "", "there is no program ip on this host: install iproute2"
    except subprocess.TimeoutExpired:
        return 124, "", "ip does not answer within %d s" % IP_TIMEOUT_S
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def read_addresses(run):
    """({interface: [address]} in the kernel's order, None) or (None, why they could not be read)."""
    code, out, err = run()
    if code != 0:
        return None, err.strip()[-200:] or "ip failed with code %s" % code
    found = {}
    try:
        for link in json.loads(out):
            given = [entry.get("local") for entry in link.get("addr_info", [])]
            found[link["ifname"]] = [address for address in given if address]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "what ip prints cannot be understood"
    return found, None


def read(root="/", run=run_ip):
    """Everything that is judged; `root` for another tree than this host's, `run` for another `ip`."""
    devices = [read_device(root, name) for name in names_in(root, "sys/class/infiniband")]
    addresses, reason = read_addresses(run) if devices else ({}, None)
    return {
        "devices": devices,
        "interfaces": read_interfaces(root),
        "addresses": addresses,
        "addresses_unknown": reason,
        "distribution": read_distribution(root),
    }


def read_distribution(root):
    release = text_of(root, "etc/os-release") or text_of(root, "usr/lib/os-release") or ""
    given = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)"?$', release, re.MULTILINE))
    return [given.get("ID", "")] * ("ID" in given) + given.get("ID_LIKE", "").split()


# --------------------------------------------------------------------------- judging


def finding(check, severity, subject, problem, fix):
    return {"check": check, "severity": severity, "subject": subject, "problem": problem, "fix": fix}


def gid_of(port, interface, addresses):
    """The GID that RoCE v2 uses with the address that the port's interface has; None where there is none.

    `interface` only, where the port carries it (a bond, a VLAN); an IPv4 address before an IPv6 one, a link-local
    one last.
    """
    names = [interface] if interface in port["interfaces"] else port["interfaces"]
    order = [(name, address) for name in names for address in addresses.get(name, [])]
    usable = [
        (rank(gid["address"]), order.index((gid["interface"], gid["address"])), gid["index"], gid)
        for gid in port["gids"]
        if gid["type"] == ROCE_V2 and (gid["interface"], gid["address"]) in order
    ]
    return min(usable, key=lambda entry: entry[:3])[3] if usable else None


def rank(address):
    parsed = ipaddress.ip_address(address)
    return 0 if parsed.version == 4 else 2 if parsed.is_link_local else 1


def chosen(devices, wanted, findings):
    """The devices that carry the fabric: those that the site names, or those of the family with the most speed."""
    if wanted:
        for name in wanted:
            if name not in [device["name"] for device in devices]:
                findings.append(
                    finding(
                        "rdma-device",
                        "error",
                        name,
                        "the inventory names this RDMA device, and the host has none of that name: it has %s"
                        % (", ".join(device["name"] for device in devices) or "none"),
                        "Load its driver, or correct rdma_fabric_devices.",
                    )
                )
        return [device for device in devices if device["name"] in wanted]
    speed = {}
    for device in devices:
        for port in device["ports"]:
            if port["state"] == "ACTIVE":
                speed[device["family"]] = speed.get(device["family"], 0) + (port["rate_gbps"] or 0)
    # Nothing is up: the family with the most devices is what is looked at.
    for device in devices:
        speed.setdefault(device["family"], 0)
    if not speed:
        return []
    family = max(sorted(speed), key=lambda name: (speed[name], sum(d["family"] == name for d in devices)))
    return [device for device in devices if device["family"] == family]


def judge_ports(devices, named, findings):
    """[(device, port)] that can carry the fabric: up, and as fast as the fastest."""
    ports = [(device, port) for device in devices for port in device["ports"]]
    fastest = max([port["rate_gbps"] or 0 for _, port in ports if port["state"] == "ACTIVE"] or [0])
    usable = []
    for device, port in ports:
        subject = "%s port %d" % (device["name"], port["port"])
        if port["state"] != "ACTIVE":
            # A second port that nobody cabled is usual; one of a device that the site counts on is not.
            findings.append(
                finding(
                    "rdma-port-down",
                    "error" if named else "warning",
                    subject,
                    "the port is %s (%s)" % (port["state"] or "in no known state", port["physical"] or "unknown"),
                    "Check cable, transceiver and switch port. Name the devices in use in rdma_fabric_devices.",
                )
            )
        elif (port["rate_gbps"] or 0) < fastest:
            findings.append(
                finding(
                    "rdma-port-slow",
                    "warning",
                    subject,
                    "the port runs at %s Gb/s, its peers at %s: it is left out of the fabric"
                    % (port["rate_gbps"], fastest),
                    "Check cable and switch port; where it is another network, name the fabric's devices in "
                    "rdma_fabric_devices.",
                )
            )
        else:
            usable.append((device, port))
    return usable


def judge_gids(ports, interface, addresses, findings):
    """([(device, port)] that have what they need, the GID index that they have in common or None)."""
    kept, indexes = [], {}
    for device, port in ports:
        if port["link_layer"] != "Ethernet":
            kept.append((device, port))
            continue
        name = "%s:%d" % (device["name"], port["port"])
        gid = gid_of(port, interface, addresses)
        if gid is None:
            seen = ["%s (%d, %s)" % (entry["address"], entry["index"], entry["type"]) for entry in port["gids"]]
            findings.append(
                finding(
                    "rdma-gid",
                    "warning",
                    "%s port %d" % (device["name"], port["port"]),
                    "no RoCE v2 GID belongs to an address that %s has; its GIDs are %s"
                    % (" or ".join(port["interfaces"]) or "its interface", ", ".join(seen) or "none"),
                    "Give the interface its IPv4 address, and check that RoCE v2 is on. The port is left out.",
                )
            )
            continue
        kept.append((device, port))
        indexes[name] = gid["index"]
    if len(set(indexes.values())) > 1:
        findings.append(
            finding(
                "rdma-gid-index",
                "warning",
                "host",
                "the GID index differs between ports: %s. One variable holds for all of them, so it is left unset"
                % ", ".join("%s has %d" % item for item in sorted(indexes.items())),
                "Give each port the same kinds of addresses in the same order. NCCL 2.21 and later finds the index of "
                "each port by itself where none is set.",
            )
        )
        return kept, None
    return kept, next(iter(indexes.values()), None)


def judge_interface(have, declared, findings):
    """The fabric interface: the declared one where it is usable, else the only one that RDMA ports have."""
    interfaces = have["interfaces"]
    ports = [port for device in have["devices"] for port in device["ports"] if port["state"] == "ACTIVE"]
    carrying = sorted({name for port in ports for name in port["interfaces"]})
    up = [name for name in carrying if interfaces.get(name, {}).get("up")]
    subject = "interface %s" % declared
    if declared and declared not in interfaces:
        problem = "the inventory declares this fabric interface, and the host has none of that name"
        fix = "Correct clusterkit_fabric_interface%s." % (": RDMA ports have %s" % ", ".join(up) if up else "")
        findings.append(finding("fabric-interface", "error", subject, problem, fix))
        return None
    if declared:
        if not interfaces[declared]["up"]:
            fix = "Bring it up: check cable, switch port and the host's network configuration."
            findings.append(finding("fabric-interface", "error", subject, "the fabric interface is down", fix))
        if up and declared not in carrying:
            problem = "the declared fabric interface belongs to no RDMA port; those have %s" % ", ".join(up)
            fix = "Nothing, where the sockets of NCCL and Gloo go another way by intent; else correct the inventory."
            findings.append(finding("fabric-interface", "warning", subject, problem, fix))
        return declared
    if len(up) > 1:
        problem = "the inventory declares no fabric interface, and several have RDMA: %s" % ", ".join(up)
        fix = "Declare clusterkit_fabric_interface for this host."
        findings.append(finding("fabric-interface", "warning", "host", problem, fix))
    return up[0] if len(up) == 1 else None


def judge_mtu(ports, interfaces, findings):
    names = sorted({name for _, port in ports for name in port["interfaces"] if name in interfaces})
    sizes = {name: interfaces[name]["mtu"] for name in names}
    if len(set(sizes.values())) > 1:
        problem = "the interfaces of the fabric have different MTUs: %s" % ", ".join(
            "%s %s" % (name, sizes[name]) for name in names
        )
        fix = "Set one MTU on all of them, on their switch ports, and on every host."
        findings.append(finding("fabric-mtu", "warning", "host", problem, fix))


def judge(have, declared="", wanted=(), required=False):
    """(fabric, findings) of what `read` found; see RETURN."""
    findings = []
    fabric = {"family": None, "interface": None, "hcas": [], "gid_index": None}
    if not have["devices"]:
        if required or wanted:
            findings.append(
                finding(
                    "rdma-device",
                    "error",
                    "host",
                    "the inventory counts on RDMA, and the kernel shows no RDMA device",
                    "Check that the card is there (lspci) and that its driver is loaded; or set "
                    "rdma_fabric_enabled: never.",
                )
            )
        return fabric, findings
    fabric["interface"] = judge_interface(have, declared, findings)
    if have["addresses"] is None:
        problem = "the addresses of this host cannot be read: %s" % have["addresses_unknown"]
        fix = "Install iproute2. Until then no GID index can be found, and no RDMA port is used."
        findings.append(finding("rdma-gid", "error", "host", problem, fix))
    devices = chosen(have["devices"], wanted, findings)
    fabric["family"] = devices[0]["family"] if devices else None
    ports = judge_ports(devices, bool(wanted), findings)
    judge_mtu(ports, have["interfaces"], findings)
    ports, fabric["gid_index"] = judge_gids(ports, fabric["interface"], have["addresses"] or {}, findings)
    fabric["hcas"] = ["%s:%d" % (device["name"], port["port"]) for device, port in ports]
    if not ports:
        problem = "no RDMA port of this host is usable: RCCL and NCCL would go over sockets, many times slower"
        fix = "See the other findings; or set rdma_fabric_enabled: never, and it is so by intent."
        findings.append(finding("rdma-fabric", "error" if required else "warning", "host", problem, fix))
    return fabric, findings


def main():
    module = AnsibleModule(
        argument_spec={
            "interface": {"type": "str", "default": ""},
            "devices": {"type": "list", "elements": "str", "default": []},
            "required": {"type": "bool", "default": False},
            "root": {"type": "path", "default": "/"},
        },
        supports_check_mode=True,
    )
    given = module.params
    have = read(given["root"])
    fabric, findings = judge(have, given["interface"], given["devices"], given["required"])
    module.exit_json(
        changed=False,
        distribution=have["distribution"],
        devices=have["devices"],
        fabric=fabric,
        findings=findings,
    )


if __name__ == "__main__":
    main()
