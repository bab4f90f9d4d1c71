"""Files that appear whole, and how a script ends."""
import json

import pytest
import torch

from runtime import UserError, has_bf16, run_main, write_json


def test_json_files_are_whole_or_absent(tmp_path):
    write_json(tmp_path / "m.json", {"AP": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "m.json", {"AP": object()})
    assert json.loads((tmp_path / "m.json").read_text()) == {"AP": 1}


def raising(error):
    def main():
        raise error
    return main


def test_a_device_has_bf16_if_it_is_known_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    known = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    for known["avx512_bf16"], known["amx_bf16"] in ((True, False), (False, True), (False, False)):
        assert has_bf16("cpu") == has_bf16("auto") == any(known.values())
        assert not has_bf16("npu:1") and not has_bf16("cuda")
    known.clear()
    assert not has_bf16("cpu")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.6
    assert not has_bf16("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert has_bf16("auto") == has_bf16("cuda:1") == has


def test_mistakes_end_in_one_line_and_bugs_in_a_traceback():
    class DataError(UserError):
        pass

    for error, line in ((UserError("no data"), "error: no data"),
                        # As a loader process sends it, with its own traceback around the message.
                        (DataError("Caught in a worker\nTraceback:\n  data.DataError: broken.jpg"),
                         "error: broken.jpg"),
                        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'"),
                        (SystemExit("error: as it is"), "error: as it is"),
                        (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(SystemExit) as stop:
            run_main(raising(error))
        assert stop.value.code == line
    with pytest.raises(SystemExit) as stop:
        run_main(raising(RuntimeError("worker died")), explain=lambda error: f"because {error}")
    assert stop.value.code == "error: because worker died"
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(raising(RuntimeError("a bug")), explain=lambda error: None)
