"""train.py in a folder of its own for each process, so that a relative --workdir is not shared."""

import os
import pathlib
import runpy
import sys

_, folder, *arguments = sys.argv
train = pathlib.Path("train.py").absolute()
own = pathlib.Path(folder) / next(argument for argument in arguments if argument.startswith("--process_id")).strip("-")
own.mkdir()
os.chdir(own)
sys.path.insert(0, str(train.parent))
sys.argv = ["train.py", *(argument for argument in arguments if not argument.startswith("--workdir=")), "--workdir=run"]
runpy.run_path(str(train), run_name="__main__")
