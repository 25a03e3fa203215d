"""The study: its models (`variants`), what they train on (`examples`), its runs (`runs`), their rows in a CSV
(`rows`), and the tables and the figure of these rows (`report`); and those of the demo (`demo_report`).
Besides, the files of sweeps (`sweep_file`).
"""
