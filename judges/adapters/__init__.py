"""Judges that people already have, called the way the library they were written for calls them.

An exception in such code is a bug of it and is let out; no score is made of it.
"""
