"""The study of balancing: claims that were written before the runs, and verdicts that are computed from their logs.

Read in this order: `claims` (what is claimed, by whom, and what would contradict it), `measures` (the numbers),
`verdicts`, `plan` (the tables), `texts` and `archive` (the logs as they are committed), `run` (training), for the page
`words` (numbers as text), `parts` (HTML and Markdown), `claims_part`, `arms`, `devices`, `labels`, `pictures`,
`sections`, `page`, and then `terminal` and `report`.
"""
