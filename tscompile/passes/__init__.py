"""One pass, one file. tscompile/pipeline.py lists them in order."""
