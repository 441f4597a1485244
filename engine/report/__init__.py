"""Artefacts as people look at them: figures, tables, one HTML page.

In: profiles, evaluations and budgets. Out: PNG, SVG, HTML, the same bytes for the same artefact.
"""
