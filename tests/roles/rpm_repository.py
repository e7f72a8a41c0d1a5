"""Stand-ins for EL's, AMD's and NVIDIA's RPM repositories, built and signed on the host that serves and uses them.

Names, layout and the shape of versions are those of the originals; what the packages hold is ours. Build machines have
no rpmbuild, so the packages are built in the container, by the real one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tests.roles.gpu_repository import NVIDIA_CTK, kernel_module

# RHEL 9.6's kernel, and one of its updates.
KERNEL, NEWER_KERNEL = "5.14.0-570.el9", "5.14.0-570.12.1.el9_6"
SERVICE = "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
PATH_UNIT = "[Path]\nPathChanged=/lib/modules\nUnit=nvidia-cdi-refresh.service\n[Install]\nWantedBy=multi-user.target\n"
DKMS = '#!/bin/sh\n[ "$1" = status ] || exit 0\ncat /var/lib/dkms/"$3".status 2>/dev/null\nexit 0\n'
# A stream of modules, as dnf reads it (modulemd 2).
STREAM = """---
document: modulemd
version: 2
data:
  name: nvidia-driver
  stream: {stream}
  version: 1
  context: 00000000
  arch: x86_64
  summary: stands for the real one
  description: stands for the real one
  license:
    module: [none]
  artifacts:
    rpms: [{artifacts}]
...
"""


@dataclass(frozen=True)
class Rpm:
    """One to be built; `version` is version-release, `tags` are lines of its spec, such as `Requires: dkms`."""

    name: str
    version: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    epoch: int = 0
    post: str = ""
    preun: str = ""
    tags: tuple[str, ...] = ()

    @property
    def full(self) -> str:
        version, release = self.version.rsplit("-", 1)
        return f"{self.name}-{self.epoch}:{version}-{release}.noarch"

    def spec(self) -> str:
        version, release = self.version.rsplit("-", 1)
        lines = [f"%package -n {self.name}", "Summary: stands for the real one", f"Version: {version}"]
        lines += [f"Release: {release}", f"Epoch: {self.epoch}", "AutoReqProv: no", *self.tags]
        lines += [f"%description -n {self.name}", "Stands for the real one."]
        for section, text in (("post", self.post), ("preun", self.preun)):
            lines += [f"%{section} -n {self.name}", f"set -e\n{text}"] if text else []
        return "\n".join([*lines, f"%files -n {self.name}", *self.files, "", ""])


def driver(module: str, name: str, version: str, dkms: str, told: str) -> Rpm:
    """A driver's DKMS package: `dkms status` says `dkms`, the module on disk says `told`."""
    image, status = f"/usr/share/stand-in/{module}-{version}.ko", f"/var/lib/dkms/{module}.status"
    place = "/lib/modules/$(uname -r)/updates/dkms"
    srcversion = hashlib.sha1(version.encode()).hexdigest()[:23].upper()
    return Rpm(
        name,
        version,
        {image: kernel_module(version=told, srcversion=srcversion)},
        post=f"mkdir -p {place} /var/lib/dkms\ncp {image} {place}/{module}.ko\ndepmod -a $(uname -r)\n"
        f'echo "{module}/{dkms}, $(uname -r), x86_64: installed" >{status}',
        # In an upgrade the old package's script comes last, with 1.
        preun=f'[ "$1" = 0 ] || exit 0\nrm -f {place}/{module}.ko {status}',
        tags=("Requires: dkms",),
    )


class RpmShop:
    """Publishes repositories below /srv of the container that `sh` and `put` are of."""

    def __init__(self, sh: Callable[[str], str], put: Callable[[dict[str, bytes]], None]) -> None:
        self.sh, self.put = sh, put
        self.built = 0
        self.known: set[str] = set()

    def key(self, name: str) -> None:
        """A key of that name; of RSA, as AMD's and NVIDIA's are."""
        if name not in self.known:
            self.sh(
                f"gpg -q --batch --pinentry-mode loopback --passphrase '' --quick-gen-key '{name} <{name}@example.com>'"
                " rsa3072 sign never"
            )
            self.known.add(name)

    def publish_key(self, name: str, path: str) -> None:
        self.key(name)
        self.sh(f"mkdir -p $(dirname /srv/{path}); gpg --armor --export {name}@example.com >/srv/{path}")

    def publish(
        self,
        path: str,
        packages: list[Rpm],
        *,
        key: str = "",
        metadata_key: str = "",
        streams: Mapping[str, list[Rpm]] | None = None,
    ) -> None:
        """A repository at `path` with these packages and no others; `streams` are those of its modules."""
        alone: list[dict[str, Rpm]] = []  # a spec has a name once
        for package in packages:
            group = next((group for group in alone if package.name not in group), None)
            if group is None:
                alone.append(group := {})
            group[package.name] = package
        self.built += 1
        build = f"/root/build/{self.built}"
        files: dict[str, bytes] = {}
        for number, group in enumerate(alone):
            head = "Name: stand-in\nVersion: 1\nRelease: 1\nSummary: none\nLicense: none\nBuildArch: noarch\n"
            head += f"%description\nNone.\n%install\ncp -a {build}/{number}/. %{{buildroot}}/\n"
            specs = "".join(package.spec() for package in group.values())
            files[f"{build}/{number}.spec"] = (head + specs).encode()
            files[f"{build}/{number}/.keep"] = b""
            for package in group.values():
                for name, content in package.files.items():
                    data = content if isinstance(content, bytes) else content.encode()
                    files[f"{build}/{number}{name}"] = data
        for name, members in (streams or {}).items():
            listed = ", ".join(f'"{member.full}"' for member in members)
            files[f"{build}/streams/{name}.yaml"] = STREAM.format(stream=name, artifacts=listed).encode()
        self.put(files)
        options = f"--define '_rpmdir {build}/rpms' --define '__os_install_post %{{nil}}'"
        self.sh(f"cd {build} && rm -f */.keep && rpmbuild -bb --quiet {options} *.spec 2>&1")
        if key:
            self.key(key)
            defined = f"--define '__gpg /usr/bin/gpg' --define '_gpg_name {key}@example.com'"
            self.sh(f"GPG_TTY=none rpmsign {defined} --addsign {build}/rpms/noarch/*.rpm 2>&1")
        root = f"/srv/{path}"
        self.sh(f"rm -rf {root}; mkdir -p {root}; mv {build}/rpms/noarch/*.rpm {root}/; createrepo_c -q {root} 2>&1")
        if streams:
            self.sh(f"cat {build}/streams/*.yaml >{build}/modules.yaml")
            self.sh(f"modifyrepo_c --mdtype=modules {build}/modules.yaml {root}/repodata 2>&1")
        if metadata_key:
            self.key(metadata_key)
            self.sh(
                f"gpg -q --batch --yes --armor -u {metadata_key}@example.com --detach-sign {root}/repodata/repomd.xml"
            )

    # What lies in the originals, as far as the roles ask for it

    def distribution(self, kernels: tuple[str, ...] = (KERNEL,), without: tuple[str, ...] = ()) -> None:
        """Stands for BaseOS, AppStream and EPEL."""
        tools = {"/usr/sbin/lspci": "#!/bin/sh\nexit 0\n", "/usr/sbin/setpci": "#!/bin/sh\nexit 1\n"}
        packages = [
            # Scripts in packages ask for its shell.
            Rpm("bash", "1-1.el9", tags=("Provides: /bin/sh",)),
            Rpm("rocky-release", "9.6-1.el9", tags=("Provides: system-release(releasever) = 9",)),
            Rpm("dkms", "1-1.el9", {"/usr/sbin/dkms": DKMS}),
            Rpm("pciutils", "1-1.el9", tools),
            # The plugin itself is Debian's, and the same: dnf-plugins-core has it there.
            Rpm("python3-dnf-plugin-versionlock", "1-1.el9"),
        ]
        # What dnf keeps in several versions says so itself.
        several = ("Provides: installonlypkg(kernel)",)
        for kernel in kernels:
            release = f"{kernel}.x86_64"
            build = f"ln -sfn /usr/src/kernels/{release} /lib/modules/{release}/build"
            packages += [
                Rpm("kernel-core", kernel, {f"/lib/modules/{release}/vmlinuz": ""}, post=build, tags=several),
                Rpm("kernel-headers", kernel),
                Rpm("kernel-devel", kernel, {f"/usr/src/kernels/{release}/Makefile": ""}, tags=several),
                Rpm("kernel-devel-matched", kernel, tags=(f"Requires: kernel-devel = {kernel}",)),
            ]
        self.publish("el", [package for package in packages if package.name not in without])

    def amd(
        self, driver_version: str, build: str, rocm: str, tools: str, *, key: str = "amd", folder: str = ""
    ) -> None:
        """amdgpu/<driver>/el/9.6, or another `folder`, and rocm/el9/<rocm>; `build` as in 6.16.13-2327507.

        Of AMD's RPMs the firmware's alone has the driver in its version: amdgpu/30.30.4/el/9.7 has
        amdgpu-dkms-firmware-30.30.4.0.30300400-2341068.el9, amdgpu/30.10.2/el/10 has amdgpu-dkms-6.14.14-2226257.el10
        (its epoch is 1).
        """
        plain, number = build.split("-")
        digits = "{:02}{:02}{:02}00".format(*map(int, driver_version.split(".")))
        firmware = Rpm("amdgpu-dkms-firmware", f"{driver_version}.0.{digits}-{number}.el9")
        module = driver("amdgpu", "amdgpu-dkms", f"{plain}-{number}.el9", f"{plain}-{number}.el9", plain)
        module = replace(module, epoch=1, tags=(*module.tags, "Requires: amdgpu-dkms-firmware"))
        self.publish(f"amd/amdgpu/{folder or driver_version}/el/9.6/main/x86_64", [firmware, module], key=key)
        smi = {"/opt/rocm/bin/amd-smi": "#!/bin/sh\necho AMDSMI Tool: 26.2.2\n"}
        self.publish(f"amd/rocm/el9/{rocm}/main", [Rpm("amd-smi-lib", tools, smi)], key=key)

    def nvidia(self, versions: list[str], *, key: str = "nvidia") -> None:
        """rhel9 of the CUDA repository with these drivers, each in its branch's stream of modules."""
        packages, streams = [], {}
        for version in versions:
            exact = f"{version}-1.el9"
            found = [replace(driver("nvidia", "kmod-nvidia-open-dkms", exact, version, version), epoch=3)]
            found.append(Rpm("nvidia-driver-cuda", exact, {"/usr/bin/nvidia-smi": "#!/bin/sh\nexit 9\n"}, epoch=3))
            for name in ("nvidia-persistenced", "nvidia-fabricmanager"):
                found.append(Rpm(name, exact, {f"/usr/lib/systemd/system/{name}.service": SERVICE}, epoch=3))
            streams[f"{version.split('.')[0]}-open"] = found
            packages += found
        self.publish("nvidia/rhel9/x86_64", packages, key=key, streams=streams)
        self.publish_key(key, "nvidia/rhel9/x86_64/D42D0685.pub")

    def toolkit(self, versions: list[str], *, key: str = "toolkit") -> None:
        """The container toolkit's: packages without a signature, in signed lists."""
        packages = []
        for version in versions:
            units = {"nvidia-cdi-refresh.path": PATH_UNIT}
            units["nvidia-cdi-refresh.service"] = "[Service]\nType=oneshot\nExecStart=/bin/true\n"
            files = {f"/usr/lib/systemd/system/{name}": text for name, text in units.items()}
            files["/usr/bin/nvidia-ctk"] = NVIDIA_CTK
            packages.append(Rpm("nvidia-container-toolkit-base", f"{version}-1", files))
            for name in ("nvidia-container-toolkit", "libnvidia-container-tools", "libnvidia-container1"):
                packages.append(Rpm(name, f"{version}-1"))
        self.publish("toolkit/stable/rpm/x86_64", packages, metadata_key=key)
        self.publish_key("toolkit", "toolkit/gpgkey")
