"""What a data set complains with; apart, so that who only catches it does without torch."""

from configs.errors import UserError


class DatasetError(UserError):
    """Something in a data set that its owner has to mend; the message names the path and the remedy."""
