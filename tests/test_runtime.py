"""Files that appear whole, and how a script ends."""
import json

import pytest

from runtime import UserError, run_main, write_json


def test_json_files_are_whole_or_absent(tmp_path):
    write_json(tmp_path / "m.json", {"AP": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "m.json", {"AP": object()})
    assert json.loads((tmp_path / "m.json").read_text()) == {"AP": 1}


def raising(error):
    def main():
        raise error
    return main


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
