"""The commands that a report prints, of folders that may come from elsewhere."""

from pathlib import Path

import pandas as pd

from proglayer.report.write import _commands


def test_a_printed_command_names_no_code_and_no_option(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n  overrides:\n"
        "    hydra: ['hydra.sweeper.n_trials=3', 'hydra.sweeper.custom_search_space=os.system',"
        " '+hydra.callbacks.a._target_=os.system', 'hydra.launcher.n_jobs=2']\n"
        "    task: ['seed=1,2', '--config-dir=/tmp', '-m', 'a=$(touch x)', '+x._target_=os.f']\n"
    )
    runs = pd.DataFrame(
        {
            "sweep": ["s", None],
            "folder": [str(tmp_path / "0"), "b"],
            "overrides": [None, "seed=3 --config-dir=/tmp 'data.path=; rm x'"],
        }
    )
    assert _commands(runs) == [
        "python train.py -m hydra.sweeper.n_trials=3 seed=1,2 'a=$(touch x)'",
        "python train.py seed=3 'data.path=; rm x'",
    ]
