"""The tests, each folder for the folder of that name; what several share is here."""
