"""The two kinds of mistake a user of the retriever can make; both print as one line that names the way out."""


class CorpusError(ValueError):
    """A corpus file that is not one `{"id": str, "contents": str}` object per line."""


class IndexFolderError(ValueError):
    """An index folder that cannot be built or served: missing parts, or parts that do not belong together."""
