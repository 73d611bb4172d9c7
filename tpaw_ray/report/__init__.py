"""One self-contained HTML file that shows a run or an experiment."""
