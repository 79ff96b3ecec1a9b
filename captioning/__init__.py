"""The library behind the commands, the notebooks and the web page."""
