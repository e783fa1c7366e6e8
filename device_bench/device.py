"""Devices by name: what a board, a phone or a computer is made of, and the host through which it is reached.

A device is one TOML file (`title`, `host`, `memory_gb`, `cores`, `bandwidth_gb_s`, `source`, `threads`, `[options]`);
those that ship lie in `devices/`. A phone with Termux and its sshd is an ssh device ("ssh:user@phone"), where
everything is measured as on any computer; as an adb device it runs the stock programs only, see `hosts/adb.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from vlmedge.device_bench.hosts.host import Host
from vlmedge.errors import UsageError, nearest
from vlmedge.records import decode, read_toml
from vlmedge.registry import Registry

FOLDER = Path(__file__).parent / "devices"
HostKind = Literal["local", "ssh", "adb", "browser", "iphone"]
# Under which option a host looks for what stands behind "@" or behind "HOST:"; the others have no address.
ADDRESS: Final[dict[str, str]] = {"ssh": "address", "adb": "serial", "iphone": "name"}
# Hosts that may ask a person to do something; they take a `tell`.
TELLING: Final[frozenset[str]] = frozenset(("browser",))


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    `memory_gb`: as it is sold, the system's part included. `cores`: of the processor, slow ones included. `threads`:
    those that a run takes where it does not say, the fast cores. `bandwidth_gb_s`: the memory's peak by its data sheet,
    in 10^9 bytes per second. `source`: the addresses of these facts. What is not known is None. `options`: what the
    host needs.
    """

    name: str
    title: str
    host: HostKind
    memory_gb: float | None = None
    cores: int | None = None
    bandwidth_gb_s: float | None = None
    source: tuple[str, ...] = ()
    threads: int | None = None
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse numbers that no device has."""
        for key in ("memory_gb", "cores", "bandwidth_gb_s", "threads"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UsageError(f"the device '{self.name}' has {key} = {value}; leave out what is not known")


HOSTS: Registry[Callable[..., Host]] = Registry(
    "host",
    {
        "adb": "vlmedge.device_bench.hosts.adb:AdbHost",
        "browser": "vlmedge.device_bench.hosts.browser:BrowserHost",
        "iphone": "vlmedge.device_bench.hosts.iphone:IphoneHost",
        "local": "vlmedge.device_bench.hosts.local:LocalHost",
        "ssh": "vlmedge.device_bench.hosts.ssh:SshHost",
    },
)


def device_names() -> tuple[str, ...]:
    """Names of the devices that ship, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_device(word: str) -> Device:
    """The device that a user names: "NAME", "NAME@ADDRESS", "ssh:ADDRESS", "adb:SERIAL" or "file.toml".

    An address is `user@host` for ssh, a serial number of `adb devices` for adb. Raises UsageError for a name that is
    not known, a file that cannot be read, a key that no device has, or an address for a host that takes none.
    """
    if word.endswith(".toml"):
        return _read(Path(word))
    host, colon, address = word.partition(":")
    if colon and host in ("ssh", "adb"):
        return _addressed(Device(word, f"a device over {host}", "ssh" if host == "ssh" else "adb"), address)
    name, at, address = word.partition("@")
    if name not in device_names():
        raise UsageError(f"unknown device '{name}'{nearest(name, device_names())}")
    device = _read(FOLDER / f"{name}.toml")
    return _addressed(device, address) if at else device


def open_host(device: Device, tell: Callable[[str], None] | None = None) -> Host:
    """The host that reaches a device, not yet connected (`Host.open` does that).

    `tell` is given what a person has to do there, one line at a time; without it that is logged.
    """
    make = HOSTS[device.host]
    return make(device, tell) if device.host in TELLING else make(device)


def _addressed(device: Device, address: str) -> Device:
    option = ADDRESS.get(device.host)
    if option is None:
        raise UsageError(f"the device '{device.name}' is reached by the host {device.host}, which takes no address")
    if not address or address.startswith("-"):  # programs would take it for one of their own options
        raise UsageError(f"the device '{device.name}' needs an address behind it, not '{address}'")
    return replace(device, options=device.options | {option: address})


def _read(path: Path) -> Device:
    data = read_toml(path, "device")
    if "name" in data:
        raise UsageError(f"the device {path} has the unknown key 'name'; its file is its name")
    if isinstance(data.get("source"), str):
        data["source"] = [data["source"]]
    return decode(Device, {"name": path.stem, **data}, str(path))
