"""Reports: plain answers and predictions become tables, figures and files."""
