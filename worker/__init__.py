"""ffmpeg-worker: a systemd-native job launcher for FFmpeg."""

__version__ = "0.1.0"
