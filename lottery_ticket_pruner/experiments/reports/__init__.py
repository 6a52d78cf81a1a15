"""Reports on run folders: statistics, tables, figures and the web page."""
