from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.testing.checkpoints import write_fp8


def call(capsys, *words):
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_importing_the_cli_imports_neither_torch_nor_sglang():
    script = (
        "import sys, sglang_w4afp8.cli as c\n"
        "heavy = {'torch', 'sglang', 'numpy', 'safetensors', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try:\n    c.main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'sglang'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["convert"], ["convert", "a", "b", "--wat"]])
def test_wrong_use_is_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: sglang-w4afp8 {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "convert", "resize-blocks", "verify"])
def test_answers_for_machines(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--json" in capsys.readouterr().out


def test_the_whole_road(tmp_path, capsys):
    source, target = write_fp8(tmp_path / "src"), tmp_path / "w4"
    code, out, _ = call(capsys, "inspect", source, "--json")
    assert code == 0
    assert json.loads(out)["expert_formats"] == {"fp8": 24}

    code, out, _ = call(capsys, "convert", source, target, "--dry-run")
    assert code == 0
    assert "would be written" in out
    assert not target.exists()

    code, out, _ = call(capsys, "convert", source, target, "--json", "--method", "rtn")
    assert code == 0
    made = json.loads(out)
    assert made["tensors_converted"] == 24
    assert made["quality"]["overall"]["snr_db"] > 13

    code, out, _ = call(capsys, "verify", source, target)
    assert code == 0
    assert out.rstrip().endswith("good")
    code, out, _ = call(capsys, "verify", source, target, "--threshold", "30", "--json")
    assert code == 1
    assert json.loads(out)["is_good"] is False

    code, out, _ = call(capsys, "inspect", target)
    assert code == 0
    assert "W4AFP8, INT4 g128" in out

    code, out, _ = call(capsys, "resize-blocks", target, "--group-size", "64", "--json")
    assert code == 0
    assert json.loads(out)["group_size"] == [128, 64]


def test_user_errors_fit_one_screen(tmp_path, capsys):
    code, _, err = call(capsys, "convert", tmp_path / "nothing", tmp_path / "dst")
    assert code == 1
    assert "Traceback" not in err
    assert "is not a directory" in err
    assert "(1)" in err
    source = write_fp8(tmp_path / "src")
    code, _, err = call(capsys, "convert", source, source)
    assert code == 2
    code, out, _ = call(
        capsys, "convert", source, tmp_path / "dst", "--activation", "static", "--json"
    )
    assert code == 2
    assert "--act-scales" in " ".join(json.loads(out)["error"]["ways"])


def test_problems_are_one(tmp_path, capsys):
    source = write_fp8(tmp_path / "src")
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = call(capsys, "inspect", source)
    assert code == 1
    assert "truncated" in out
    code, _, err = call(capsys, "convert", source, tmp_path / "dst")
    assert code == 1
    assert "truncated" in err


def test_unreadable_files_are_told(tmp_path, capsys, monkeypatch):
    from sglang_w4afp8.tools import convert

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(convert, "open_index", refuse)
    code, _, err = call(capsys, "convert", tmp_path / "src", tmp_path / "dst")
    assert code == 1
    assert "Permission denied" in err
