"""Know the photographs before training: wrong labels, duplicates, broken images; find some; choose what to label."""
