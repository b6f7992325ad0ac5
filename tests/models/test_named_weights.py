"""Known weights: the registry, and fetching them from a local server, well and badly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from sam_layouts import random_sam
from weights_server import serving

from dendsam_deploy.cli.main import main
from dendsam_deploy.errors import CheckpointError, IncompleteRunError, MissingCapabilityError, StorageError
from dendsam_deploy.models import named_weights
from dendsam_deploy.models.named_weights import KnownWeights, cache_folder, known_weights, resolve
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.models.weights_download import DownloadOptions, fetch

CONTENT = b"\x80\x02" + bytes(range(256)) * 20_000  # 5 MB: several chunks; it begins as a checkpoint does
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ENTRY = KnownWeights("some_sam", "sam", "vit_b", "CC0-1.0", "nobody", file="some.pth", digest=f"sha256:{SHA256}")


@pytest.fixture
def server():
    with serving(CONTENT) as found:
        yield found


@pytest.fixture
def told():
    return []


@pytest.fixture
def options(server, told):
    return DownloadOptions(mirror=server.url, zenodo=server.url, pauses_s=(0, 0), tell=told.append)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


class TestRegistry:
    def test_every_entry_is_whole(self):
        digests = {"sha256": 64, "md5": 32, "xxh128": 32}
        for entry in known_weights().values():
            assert entry.role in ("sam", "detector")
            assert entry.licence
            assert entry.source
            assert bool(entry.packaged) + bool(entry.url) + bool(entry.zenodo_record) == 1
            assert entry.url.startswith("https://") or not entry.url
            if entry.digest:
                algorithm, _, value = entry.digest.partition(":")
                assert re.fullmatch(rf"[0-9a-f]{{{digests[algorithm]}}}", value)
            if entry.packaged:
                assert entry.place.is_file()
            else:
                assert Path(entry.file).name == entry.file
                assert entry.file.endswith((".pt", ".pth"))

    def test_names_that_labs_use(self):
        known = known_weights()
        assert {
            "sam_vit_b",
            "sam_vit_l",
            "sam_vit_h",
            "mobile_sam",
            "dendritesam_vit_b",
            "dendritesam_vit_l",
        } <= known.keys()
        assert known["vit_b_em_organelles"] is known["microsam_vit_b_em_organelles"]

    def test_published_files_are_what_they_are_said_to_be(self, shared_data):
        """The one file of the registry that is at hand."""
        found = hashlib.sha256((shared_data / "yolo" / "yolov8n.pt").read_bytes()).hexdigest()
        assert known_weights()["yolov8n"].digest == f"sha256:{found}"

    @pytest.mark.parametrize(
        ("environment", "platform", "expected"),
        [
            ({"DENDSAM_CACHE": "/a/b"}, "linux", Path("/a/b/weights")),
            ({"XDG_CACHE_HOME": "/c"}, "linux", Path("/c/dendsam-deploy/weights")),
            ({"XDG_CACHE_HOME": "relative"}, "linux", Path.home() / ".cache/dendsam-deploy/weights"),
            ({}, "darwin", Path.home() / "Library/Caches/dendsam-deploy/weights"),
            ({"LOCALAPPDATA": "/d"}, "win32", Path("/d/dendsam-deploy/weights")),
        ],
    )
    def test_cache(self, environment, platform, expected):
        assert cache_folder(environment, platform) == expected


class TestResolve:
    def test_a_path_is_itself_and_loads_nothing(self, tmp_path):
        (tmp_path / "sam_vit_b").write_text("a file of that name")
        program = (
            "import sys, socket\n"
            "socket.socket = None\n"
            "from dendsam_deploy.models.named_weights import resolve\n"
            "print(resolve('sam_vit_b'), resolve('demo_sam').name, resolve('no/such.pt'))\n"
            "print([name for name in ('requests', 'pooch', 'urllib3', 'torch') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines() == ["sam_vit_b sam_tiny.pt no/such.pt", "[]"]

    def test_a_name_that_nobody_knows_gets_the_list(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match=r"did you mean sam_vit_b\? Known: demo_sam, .*mobile_sam"):
            resolve("sam_vitb")

    def test_it_is_fetched_into_the_cache_and_found_there(self, server, tmp_path, monkeypatch, capfd):
        """Through the command line, as a user does it, from a mirror."""
        monkeypatch.setenv("DENDSAM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("DENDSAM_WEIGHTS_URL", f"{server.url}/mirror/")
        monkeypatch.chdir(tmp_path)
        torch.save(random_sam().state_dict(), tmp_path / "sam.pt")
        server.content = (tmp_path / "sam.pt").read_bytes()
        digest = f"sha256:{hashlib.sha256(server.content).hexdigest()}"
        registry = {"lab_sam": dataclasses.asdict(dataclasses.replace(ENTRY, digest=digest, aliases=()))}
        del registry["lab_sam"]["name"]
        (tmp_path / "registry.json").write_text(json.dumps(registry))
        monkeypatch.setattr(named_weights, "_FOLDER", tmp_path)
        path = resolve("lab_sam")
        assert path == tmp_path / "cache" / "weights" / "some.pth"
        assert load_sam(path).record.model_type == "tiny"
        assert server.requests == [("/mirror/some.pth", None)]
        server.statuses = [500] * 99
        assert resolve("lab_sam") == path  # offline from now on
        assert len(server.requests) == 1
        assert main(["info", "lab_sam"]) == 0
        assert "is_here              yes" in capfd.readouterr().out

    def test_without_the_packages_that_fetch(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DENDSAM_CACHE", str(tmp_path))
        monkeypatch.setitem(sys.modules, "pooch", None)
        monkeypatch.delitem(sys.modules, "dendsam_deploy.models.weights_download", raising=False)
        with pytest.raises(
            MissingCapabilityError, match=r"needs the package 'pooch'.* pip install 'dendsam-deploy\[train\]'"
        ):
            resolve("mobile_sam")


class TestFetching:
    def test_whole(self, server, options, told, tmp_path):
        shown = []
        path = fetch(ENTRY, tmp_path / "new" / "cache", dataclasses.replace(options, progress=shown.append))
        assert path.read_bytes() == CONTENT
        assert names_in(path.parent) == ["some.pth"]
        assert "CC0-1.0" in told[0]
        assert shown[-1].done == shown[-1].total == len(CONTENT)
        assert fetch(ENTRY, path.parent, options) == path
        assert len(server.requests) == 1

    def test_a_broken_transfer_goes_on_where_it_stopped(self, server, options, tmp_path):
        server.break_after = [2_000_000, 1_000_000]
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        starts = [int(asked[6:-1]) for _, asked in server.requests[1:]]
        assert [path for path, _ in server.requests] == ["/some.pth"] * 3
        assert 1_700_000 < starts[0] <= 2_000_000
        assert starts[0] + 700_000 < starts[1] <= starts[0] + 1_000_000

    def test_one_that_keeps_breaking_goes_on_in_the_next_call(self, server, options, tmp_path):
        server.break_after = [1_500_000, 0, 0, 0, 0]
        with pytest.raises(IncompleteRunError, match=r"broke off .* MB are kept: run the same command again"):
            fetch(ENTRY, tmp_path, options)
        assert names_in(tmp_path) == [".some.pth.part", ".some.pth.part.json"]
        kept = (tmp_path / ".some.pth.part").stat().st_size
        assert 0 < kept <= 1_500_000
        server.break_after, server.requests = [], []
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        assert server.requests == [("/some.pth", f"bytes={kept}-")]
        assert names_in(tmp_path) == ["some.pth"]

    def test_a_killed_process_leaves_what_arrived(self, server, options, tmp_path):
        """Also when everything had arrived but its name."""
        (tmp_path / ".some.pth.part").write_bytes(CONTENT)
        (tmp_path / ".some.pth.part.json").write_text(json.dumps({"url": f"{server.url}/some.pth", "version": '"v1"'}))
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        assert server.requests == [("/some.pth", f"bytes={len(CONTENT)}-")]

    def test_a_server_without_ranges_sends_all_again(self, server, options, tmp_path):
        server.ranges = False
        server.break_after = [2_000_000]
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        assert len(server.requests) == 2

    def test_a_file_that_changed_meanwhile_is_not_mixed(self, server, options, tmp_path):
        server.break_after = [2_000_000, 0, 0]
        server.content = bytes(len(CONTENT))
        with pytest.raises(IncompleteRunError):
            fetch(ENTRY, tmp_path, options)
        server.content, server.etag = CONTENT, '"v2"'
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT

    def test_what_arrived_from_elsewhere_is_not_mixed(self, server, options, tmp_path):
        (tmp_path / ".some.pth.part").write_bytes(b"x" * 1000)
        (tmp_path / ".some.pth.part.json").write_text(
            json.dumps({"url": "http://elsewhere/some.pth", "version": '"v1"'})
        )
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        assert server.requests == [("/some.pth", None)]

    def test_a_server_that_is_busy_is_asked_again(self, server, options, tmp_path):
        server.statuses = [503, 429]
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT

    def test_a_wrong_digest_leaves_nothing(self, server, options, tmp_path):
        server.content = CONTENT[:-1] + b"x"
        with pytest.raises(CheckpointError, match=r"does not have the digest sha256:.* and was deleted"):
            fetch(ENTRY, tmp_path, options)
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("status", [403, 404, 410])
    def test_a_file_that_is_gone(self, server, options, tmp_path, status):
        server.statuses = [status]
        with pytest.raises(CheckpointError, match=rf"answers {status} .*give the path of what you download"):
            fetch(ENTRY, tmp_path, options)
        assert len(server.requests) == 1

    def test_nobody_there(self, options, tmp_path):
        away = dataclasses.replace(options, mirror="http://127.0.0.1:9")
        with pytest.raises(MissingCapabilityError, match=r"cannot be reached from here .*Connection refused"):
            fetch(ENTRY, tmp_path, away)

    def test_too_large_for_the_disk(self, server, options, tmp_path):
        server.announces = shutil.disk_usage(tmp_path).free + 10**12
        with pytest.raises(StorageError, match=r"MB are free, .* MB are needed; .*DENDSAM_CACHE"):
            fetch(ENTRY, tmp_path, options)

    def test_a_full_disk_keeps_what_arrived(self, server, options, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))  # stands in for the end of the disk
        try:
            with pytest.raises(StorageError, match="File too large"):
                fetch(ENTRY, tmp_path, options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        assert server.requests[-1][1] is not None

    def test_a_place_that_cannot_be_written(self, options, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError):
            fetch(ENTRY, tmp_path / "file" / "cache", options)

    def test_two_at_once_fetch_it_once(self, server, options, tmp_path):
        found = []
        threads = [threading.Thread(target=lambda: found.append(fetch(ENTRY, tmp_path, options))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [tmp_path / "some.pth"] * 3
        assert len(server.requests) == 1

    def test_a_cached_file_that_was_damaged_is_fetched_again(self, options, told, tmp_path):
        (tmp_path / "some.pth").write_bytes(b"cut off")
        assert fetch(ENTRY, tmp_path, options).read_bytes() == CONTENT
        assert "does not have its published digest" in told[0]


class TestDigestsOfOthers:
    def test_md5_and_xxh128(self, options, tmp_path):
        for name, digest in (("md5", hashlib.md5(CONTENT).hexdigest()), ("xxh128", xxhash.xxh128(CONTENT).hexdigest())):
            entry = dataclasses.replace(ENTRY, digest=f"{name}:{digest}")
            assert fetch(entry, tmp_path / name, options).is_file()
            assert (tmp_path / name / "some.pth.sha256").read_text() == f"{SHA256}  some.pth\n"
            with pytest.raises(CheckpointError, match=f"does not have the digest {name}:00"):
                fetch(dataclasses.replace(entry, digest=f"{name}:{'0' * 32}"), tmp_path / f"wrong-{name}", options)

    def test_without_one_the_first_use_is_noted_and_told(self, server, options, told, tmp_path):
        entry = dataclasses.replace(ENTRY, digest="")
        path = fetch(entry, tmp_path, options)
        assert f"noted {SHA256} on first use" in told[-1]
        assert fetch(entry, tmp_path, options) == path
        assert len(server.requests) == 1

    def test_a_page_in_place_of_the_file_is_not_kept(self, server, options, tmp_path):
        server.content = b"<html>please log in</html>"
        with pytest.raises(CheckpointError, match=r"what arrived \(26 bytes\) is no checkpoint and was deleted"):
            fetch(dataclasses.replace(ENTRY, digest=""), tmp_path, options)
        assert not list(tmp_path.glob("some.pth*"))

    def test_what_was_noted_must_not_change(self, server, options, tmp_path):
        entry = dataclasses.replace(ENTRY, digest="")
        path = fetch(entry, tmp_path, options)
        path.write_bytes(b"another file")
        with pytest.raises(CheckpointError, match="changed since it was fetched"):
            fetch(entry, tmp_path, options)
        path.unlink()
        server.content = b"the source changed"
        with pytest.raises(CheckpointError, match=f"does not have the digest sha256:{SHA256}"):
            fetch(entry, tmp_path, options)
        assert not path.exists()


class TestZenodo:
    ENTRY = dataclasses.replace(ENTRY, file="dendrite.pth", digest="", zenodo_record=123, zenodo_pattern="vit[-_ ]?b")

    @pytest.fixture
    def record(self, server, options):
        server.files = [
            {"key": "ViT-L-resize-EM-dendrite.pth", "checksum": "md5:0", "size": 1},
            {"key": "ViT-B-resize-EM-dendrite.pth", "checksum": f"md5:{hashlib.md5(CONTENT).hexdigest()}", "size": 1},
            {"key": "vit_b_readme.txt", "checksum": "md5:0", "size": 1},
        ]
        return dataclasses.replace(options, mirror="")

    def test_the_record_tells_which_file_it_is_and_its_digest(self, server, record, told, tmp_path):
        path = fetch(self.ENTRY, tmp_path, record)
        assert path.name == "dendrite.pth"
        assert path.read_bytes() == CONTENT
        assert [asked for asked, _ in server.requests] == [
            "/api/records/123",
            "/records/123/files/ViT-B-resize-EM-dendrite.pth?download=1",
        ]
        assert "cc-by-4.0" in told[0]

    def test_its_digest_is_checked(self, server, record, tmp_path):
        server.content = b"another file"
        with pytest.raises(CheckpointError, match="does not have the digest md5:"):
            fetch(self.ENTRY, tmp_path, record)

    @pytest.mark.parametrize(("pattern", "count"), [("vit", 2), ("vit[-_ ]?h", 0)])
    def test_files_that_cannot_be_told_apart_are_listed(self, record, tmp_path, pattern, count):
        entry = dataclasses.replace(self.ENTRY, zenodo_pattern=pattern)
        with pytest.raises(
            CheckpointError, match=rf"{count} of its files look like .*ViT-B-resize.*expected one; download"
        ):
            fetch(entry, tmp_path, record)

    def test_a_record_that_is_gone(self, server, record, tmp_path):
        server.statuses = [404]
        with pytest.raises(CheckpointError, match="records/123: the source answers 404"):
            fetch(self.ENTRY, tmp_path, record)
