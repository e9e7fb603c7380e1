"""A Django application for the project that test_django.py starts: ORM, admin, forms, files."""
