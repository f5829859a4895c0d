"""A column of your own in the report's table: in a clone, `PYTHONPATH=. python docs/examples/column.py DIR`."""

from experiments.report import COLUMNS, Column, main
from experiments.report.numbers import tail

loss = Column("loss in the last quarter", 3, tail("loss"))  # finished run -> number

if __name__ == "__main__":
    main(columns=[*COLUMNS, loss])
