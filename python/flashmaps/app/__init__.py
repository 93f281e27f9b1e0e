"""The command line and what it shows: demo, report, doctor.

May import every other room; none imports it. The way in is :func:`flashmaps.app.cli.main`.
"""
