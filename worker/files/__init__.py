"""Files that others may have had their hands on: those of a job, and those in media folders.

Whoever may write in a folder can put a link, a pipe or a device there, or swap a folder for a
link between two system calls. So everything here is opened one component at a time, relative to
the folder opened before, never through a link, and looked at before it is opened for reading.
"""
