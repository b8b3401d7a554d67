"""Know the photographs before training: wrong labels, duplicates and bad images; and find some."""
