"""Statistics of sweeps, from numbers alone: nothing here reads a file.

Read in this order: `intervals` (over seeds), `blocks` (branched sweeps: effect, favour, switching cost), `components`
(what the spread consists of), `power` (how many runs resolve a difference), `simulation` (which intervals are honest).
"""
