"""Pages to look at and a card to publish: of a profile, of two profiles, of a pruned model; the plots also for
notebooks.

page: HTML of sections. plots: arrays -> plotly. profile_report, comparison: what is on a page. card: a model card in
Markdown. notebook: one plot. sweep_points: a sweep, read. Nothing here is imported before it is used, because plotly
takes a while.
"""
