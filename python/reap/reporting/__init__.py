"""Pages to look at and a card to publish: of a profile, of two profiles, of a pruned model; the figures also for
notebooks.

page: HTML of sections. figures: arrays -> plotly. profile_report, comparison: what is on a page. card: a model card in
Markdown. notebook: one figure. sweep_rows: a sweep, read. Nothing here is imported before it is used, for plotly takes
a while.
"""
