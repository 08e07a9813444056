"""What a training needs besides the method: arguments, callbacks, checks, records, the Trainer around the loss."""
