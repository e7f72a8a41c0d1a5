"""Stand-ins for AMD's and NVIDIA's package repositories: laid out and signed as theirs, with tiny packages in them.

Names, layout and versions are those of the originals (README of the roles); what the packages hold is ours. A stand-in
for a driver brings a module that modinfo can read and no kernel can load.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

# update-grub, and the beginning of what grub-mkconfig is: kernel_parameters looks for the folder of the drop-ins in it.
GRUB = """#!/bin/sh
set -a; GRUB_CMDLINE_LINUX= GRUB_CMDLINE_LINUX_DEFAULT=quiet
for file in /etc/default/grub /etc/default/grub.d/*.cfg; do [ -e "$file" ] && . "$file"; done
echo "menuentry 'Debian' {
  linux /boot/vmlinuz-$(uname -r) root=/dev/vda1 ro $GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT
}" >/boot/grub/grub.cfg
"""
# As NVIDIA's driver, which leaves the making of its device files to others.
NVIDIA_CTK = """#!/bin/sh
[ "$*" = "system create-device-nodes --control-devices --load-kernel-modules" ] || exit 2
[ -e /sys/module/nvidia ] || { echo "nvidia-ctk: the kernel modules cannot be loaded" >&2; exit 1; }
touch /dev/nvidiactl /dev/nvidia-uvm
"""


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar of root's files by their path, for a container; what lies in a folder named bin or sbin is executable."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size, member.mode = len(data), 0o755 if Path(path).parent.name in ("bin", "sbin") else 0o644
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def kernel_module(**info: str) -> bytes:
    """An ELF object with nothing but a `.modinfo`, as `modinfo` and `depmod` read it."""
    modinfo = b"".join(f"{key}={value}\0".encode() for key, value in info.items())
    names = b"\0.modinfo\0.shstrtab\0"
    offset = 64 + len(modinfo)
    table = offset + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    # Relocatable, x86-64; three section headers, the last of which has the names.
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, kind: int, flags: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, at, size, 0, 0, 1, 0)

    sections = bytes(64) + section(1, 1, 2, 64, len(modinfo)) + section(10, 3, 0, offset, len(names))
    return header + modinfo + names + sections


@dataclass
class Package:
    """One that has been built: its file, and its entry in an index without the line of its place."""

    file: Path
    fields: str


class Shop:
    """Builds packages and publishes repositories below `root`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.build = folder / "srv", folder / "build"
        self.root.mkdir()
        self.build.mkdir()
        # Short, for the agent's socket.
        self.gnupg = folder / "g"
        self.gnupg.mkdir(mode=0o700)

    def gpg(self, *words: str) -> bytes:
        command = ["gpg", "-q", "--batch", "--pinentry-mode", "loopback", "--passphrase", "", *words]
        environment = {**os.environ, "GNUPGHOME": str(self.gnupg)}
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout

    def key(self, name: str) -> bytes:
        """The armored public key of that name; made at the first time."""
        if not self.gpg("--list-keys", "--with-colons", "--fingerprint") or name not in self._known():
            self.gpg("--quick-gen-key", f"{name} <{name}@example.com>", "ed25519", "sign", "never")
        return self.gpg("--armor", "--export", f"{name}@example.com")

    def _known(self) -> str:
        return self.gpg("--list-keys", "--with-colons").decode()

    def fingerprint(self, name: str) -> str:
        listed = self.gpg("--list-keys", "--with-colons", f"{name}@example.com").decode()
        return next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))

    def package(
        self,
        name: str,
        version: str,
        files: Mapping[str, str | bytes] | None = None,
        *,
        postinst: str = "",
        prerm: str = "",
        **fields: str,
    ) -> Package:
        """Builds one; what lies in a folder named bin or sbin is made executable."""
        folder = self.build / f"{name}_{version.replace(':', '%3a')}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <nobody@example.com>\n"
        control += "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in fields.items())
        control += "Description: stands for the real one\n"
        (folder / "DEBIAN/control").write_text(control)
        for script, text in (("postinst", postinst), ("prerm", prerm)):
            if text:
                (folder / "DEBIAN" / script).write_text(f"#!/bin/sh\nset -e\n{text}\n")
                (folder / "DEBIAN" / script).chmod(0o755)
        for path, content in (files or {}).items():
            target = folder / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.encode())
            target.chmod(0o755 if target.parent.name in ("bin", "sbin") else 0o644)
        file = self.build / f"{folder.name}_all.deb"
        build = ["dpkg-deb", "-Zgzip", "--root-owner-group", "--build", str(folder), str(file)]
        subprocess.run(build, check=True, capture_output=True)
        shutil.rmtree(folder)
        return Package(file, control)

    def publish(
        self, path: str, packages: list[Package], *, key: str, suite: str = "", origin: str = "", label: str = ""
    ) -> None:
        """A repository at `path`; without a suite a flat one."""
        root = self.root / path
        shutil.rmtree(root / "dists" / suite if suite else root, ignore_errors=True)
        pool = root / "pool" if suite else root
        index = root / f"dists/{suite}/main/binary-amd64" if suite else root
        pool.mkdir(parents=True, exist_ok=True)
        index.mkdir(parents=True, exist_ok=True)
        entries = []
        for package in packages:
            data = package.file.read_bytes()
            place = "pool/" if suite else "./"
            (pool / package.file.name).write_bytes(data)
            entries.append(
                f"{package.fields}Filename: {place}{package.file.name}\nSize: {len(data)}\n"
                f"SHA256: {hashlib.sha256(data).hexdigest()}\n"
            )
        text = "\n".join(entries).encode()
        (index / "Packages").write_bytes(text)
        top = root / "dists" / suite if suite else root
        name = str((index / "Packages").relative_to(top))
        release = f"Origin: {origin}\nLabel: {label}\nDate: {formatdate(usegmt=True)}\n"
        release += f"Suite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: amd64\n" if suite else ""
        release += f"SHA256:\n {hashlib.sha256(text).hexdigest()} {len(text)} {name}\n"
        (self.build / "Release").write_text(release)
        if not key:  # for [trusted=yes]
            return
        self.key(key)
        signed = self.gpg("--clearsign", "-u", f"{key}@example.com", "-o", "-", str(self.build / "Release"))
        (top / "InRelease").write_bytes(signed)

    # What lies in the originals, as far as the roles ask for it

    def driver(self, module: str, name: str, version: str, dkms: str, told: str, depends: str = "dkms") -> Package:
        """A driver's DKMS package: `dkms status` says `dkms`, the module on disk says `told`."""
        image = f"/usr/share/stand-in/{module}.ko"
        place = "/lib/modules/$(uname -r)/updates/dkms"
        return self.package(
            name,
            version,
            {image: kernel_module(version=told, srcversion=hashlib.sha1(version.encode()).hexdigest()[:23].upper())},
            postinst=f"mkdir -p {place} /var/lib/dkms\ncp {image} {place}/\ndepmod -a\n"
            f'echo "{module}/{dkms}, $(uname -r), x86_64: installed" >/var/lib/dkms/{module}.status',
            prerm=f"rm -f {place}/{module}.ko /var/lib/dkms/{module}.status\ndepmod -a",
            Depends=depends,
        )

    def distribution(self, kernels: list[str], names: tuple[str, ...] = ()) -> None:
        """What Debian's own repository has to give; of `names` there are packages with nothing in them."""
        dkms = '#!/bin/sh\n[ "$1" = status ] || exit 0\ncat /var/lib/dkms/"$3".status 2>/dev/null\nexit 0\n'
        packages = [
            self.package("dkms", "3.0.10-8+deb12u1", {"/usr/sbin/dkms": dkms}),
            self.package(
                "pciutils",
                "1:3.9.0-4",
                {"/usr/bin/lspci": "#!/bin/sh\nexit 0\n", "/usr/bin/setpci": "#!/bin/sh\nexit 1\n"},
            ),
        ]
        for kernel in kernels:
            files = {f"/lib/modules/{kernel}/build/Makefile": ""}
            packages.append(self.package(f"linux-headers-{kernel}", "6.1.1-1", files))
        packages += [self.package(name, "1-1") for name in names]
        self.publish("debian", packages, key="", origin="Debian")

    def amd(
        self,
        driver: str,
        build: str,
        rocm: str,
        tools: str,
        *,
        key: str = "amd",
        suite: str = "jammy",
        smi: str = "#!/bin/sh\necho AMDSMI Tool: 26.2.2\n",
    ) -> None:
        """amdgpu/<driver> and rocm/apt/<rocm>; `build` is the version of AMD's package, as 6.16.13.30300300-2327507."""
        upstream, number = build.split("-")
        plain = ".".join(upstream.split(".")[:3])
        firmware = self.package("amdgpu-dkms-firmware", f"{driver}.0.{upstream.split('.')[-1]}-{number}.22.04")
        module = self.driver(
            *("amdgpu", "amdgpu-dkms", f"1:{build}.22.04", f"{plain}-{number}.22.04", plain),
            depends="dkms, amdgpu-dkms-firmware",
        )
        origin = "repo.radeon.com"
        self.publish(f"amd/amdgpu/{driver}/ubuntu", [firmware, module], key=key, suite=suite, origin=origin)
        tool = self.package("amd-smi-lib", tools, {"/opt/rocm/bin/amd-smi": smi})
        self.publish(f"amd/rocm/apt/{rocm}", [tool], key=key, suite=suite, origin=origin)
        (self.root / "amd/rocm/rocm.gpg.key").write_bytes(self.key(key))

    def nvidia(self, versions: list[str], toolkits: list[str], *, smi: str = "#!/bin/sh\nexit 9\n") -> None:
        """debian12 of the CUDA repository with these drivers, and the container toolkit's.

        A driver is pinned by its branch or by its version: nvidia-driver-pinning-580, nvidia-driver-pinning-580.105.08.
        """
        found = []
        unit = "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
        for version in versions:
            branch = version.split(".")[0]
            for name, pattern in ((branch, f"{branch}.*"), (version, f"{version}-*")):
                pin = f"Package: *nvidia*\nPin: version {pattern}\nPin-Priority: 1000\n"
                files = {"/etc/apt/preferences.d/nvidia-driver-pin": pin}
                one = {"Provides": "nvidia-driver-pinning", "Conflicts": "nvidia-driver-pinning"}
                found.append(self.package(f"nvidia-driver-pinning-{name}", "1-1", files, **one))
            exact = f"{version}-1"
            found.append(self.driver("nvidia", "nvidia-kernel-open-dkms", exact, version, version))
            found.append(self.package("nvidia-driver-cuda", exact, {"/usr/bin/nvidia-smi": smi}))
            for name in ("nvidia-persistenced", "nvidia-fabricmanager"):
                found.append(self.package(name, exact, {f"/lib/systemd/system/{name}.service": unit}))
        self.publish("nvidia/debian12/x86_64", found, key="nvidia", label="NVIDIA CUDA")
        (self.root / "nvidia/debian12/x86_64/3bf863cc.pub").write_bytes(self.key("nvidia"))
        tools = []
        path_unit = "[Path]\nPathChanged=/lib/modules\nUnit=nvidia-cdi-refresh.service\n"
        path_unit += "[Install]\nWantedBy=multi-user.target\n"
        refresh = "[Service]\nType=oneshot\nExecStart=/bin/true\n"
        for version in toolkits:
            files = {
                "/lib/systemd/system/nvidia-cdi-refresh.path": path_unit,
                "/lib/systemd/system/nvidia-cdi-refresh.service": refresh,
                "/usr/bin/nvidia-ctk": NVIDIA_CTK,
            }
            tools.append(self.package("nvidia-container-toolkit-base", f"{version}-1", files))
            for name in ("nvidia-container-toolkit", "libnvidia-container-tools", "libnvidia-container1"):
                tools.append(self.package(name, f"{version}-1"))
        self.publish("toolkit/stable/deb/amd64", tools, key="toolkit")
        (self.root / "toolkit/gpgkey").write_bytes(self.key("toolkit"))
