"""Images: readers, transforms, batches."""
