"""The paper's analyses on runs of one's own, as rows and as a page."""
