"""The HTML report and the table on the terminal."""
