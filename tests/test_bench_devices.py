"""Devices: every file that ships, names with addresses, and what is said of those that are not there."""

from contextlib import ExitStack
from dataclasses import replace

import pytest

from vlmedge.device_bench import bench
from vlmedge.device_bench.device import FOLDER, HOSTS, device_names, load_device, open_host
from vlmedge.errors import UsageError
from vlmedge.progress import Progress

MOST = {"memory_gb": (2, 512), "cores": (1, 64), "bandwidth_gb_s": (4, 1000)}


@pytest.mark.parametrize("name", device_names())
def test_every_device_is_whole_and_sourced(name):
    device = load_device(name)
    assert device.name == name
    assert device.title
    assert device.host in HOSTS
    assert not set(device.options) & {"address", "serial"}  # the user's, behind an @
    for key, (least, most) in MOST.items():
        value = getattr(device, key)
        assert value is None or least <= value <= most
    if device.host in ("local", "browser"):
        assert device.memory_gb is device.cores is device.bandwidth_gb_s is None  # measured, not looked up
    else:
        assert None not in (device.memory_gb, device.cores, device.threads)
        assert device.threads <= device.cores
        assert device.source
    assert all(source.startswith(("https://", "http://")) and " " not in source for source in device.source)


def test_the_usual_ones_are_there():
    wanted = "local chromium raspberry-pi-5-8gb jetson-agx-orin-64gb pixel-8 iphone-16-pro mac-mini-m4 intel-n100"
    assert set(wanted.split()) <= set(device_names())


def test_names_with_addresses():
    assert load_device("raspberry-pi-5-8gb@pi@10.0.0.5").options == {"address": "pi@10.0.0.5"}
    assert load_device("pixel-8@192.168.1.7:5555").options == {"serial": "192.168.1.7:5555"}
    plain = load_device("ssh:user@phone")
    assert (plain.host, plain.options, plain.memory_gb, plain.source) == ("ssh", {"address": "user@phone"}, None, ())
    assert load_device("adb:R5CT1").host == "adb"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "my phone.toml"
    path.write_text('title = "mine"\nhost = "adb"\nmemory_gb = 8\nsource = "https://x"\n[options]\nserial = "A"\n')
    device = load_device(str(path))
    assert (device.name, device.memory_gb, device.source) == ("my phone", 8.0, ("https://x",))
    assert device.options == {"serial": "A"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('host = "adb"', "lacks the key 'title'"),
        ('title = "x"\nhost = "abd"', "did you mean 'adb'"),
        ('title = "x"\nhost = "adb"\nmemory = 8', "unknown key 'memory'; did you mean 'memory_gb'"),
        ('title = "x"\nhost = "adb"\ncores = 0', "leave out what is not known"),
        ('title = "x"\nhost = "adb"\nname = "y"', "its file is its name"),
        ('title = "x"\nhost = "adb"\n[options]\nport = 22', "must be a string"),
        ("title = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "d.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        load_device(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("raspberry-pi-5", "unknown device 'raspberry-pi-5'; did you mean 'raspberry-pi-5-"),
        ("local@x", "takes no address"),
        ("pixel-8@", "needs an address behind it"),
        ("ssh:-oProxyCommand=x", "needs an address behind it, not '-oProxyCommand=x'"),
        ("nowhere.toml", "cannot be read: No such file"),
        ("../devices/local", "unknown device"),
    ],
)
def test_a_wrong_name_is_one_line(word, words):
    with pytest.raises(UsageError, match=words) as error:
        load_device(word)
    assert "\n" not in str(error.value)


def test_a_board_of_unlike_cores_computes_on_the_fast_ones():
    with ExitStack() as stack:
        found = list(bench._hosts(("rock-5b-8gb@a", "rock-5b-8gb@b", "ssh:c"), None, stack, Progress()))
    assert [(name, host.name, threads) for name, host, threads in found] == [
        ("rock-5b-8gb@a", "ssh a", 4),
        ("rock-5b-8gb@b", "ssh b", 4),
        ("ssh:c", "ssh c", None),
    ]


def test_hosts_are_opened_by_name():
    device = load_device("pixel-8@R5CT1")
    assert open_host(device).name == "adb R5CT1"
    with pytest.raises(UsageError, match="unknown host"):
        open_host(replace(device, host="usb"))  # type: ignore[arg-type]
    assert FOLDER.name == "devices"
