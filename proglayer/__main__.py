"""`python -m proglayer` lists the commands."""

from proglayer import __version__

print(f"""proglayer {__version__}

python train.py                    one run; --help lists the settings
python train.py -m ...             a sweep of runs
python -m proglayer.results DIR    the table of runs, finished or not
python -m proglayer.report DIR     what the data of a study say, as a page
python -m proglayer.exits RUN      what the exits of finished runs are worth
python -m proglayer.store list     the store of trained phases: list, prune
python -m proglayer.run DIR -o TO   a run's model for transformers, where it is one of its""")
