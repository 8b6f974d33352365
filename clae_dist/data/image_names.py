"""Names of files and folders in a folder of images: which are images, and which belong to a system."""

from __future__ import annotations

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_IMAGES = (*_JPEG, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")

_SYSTEM = frozenset(
    {
        *("__macosx", "__pycache__", "lost+found"),
        *("@eadir", "@tmp", "#recycle", "#snapshot"),  # Synology: thumbnails, deleted files, snapshots
        *("@recycle", "@recently-snapshot", "@__thumb"),  # QNAP
        *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
    }
)


def is_hidden(name: str) -> bool:
    """True for a name that a file manager, a system or a NAS leaves behind (._a.jpg, __MACOSX, @eaDir)."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image_name(name: str) -> bool:
    return name.lower().endswith(_IMAGES) and not is_hidden(name)
