"""Hostile jobs, by the million, against all that is made of a job before ffmpeg is started."""
