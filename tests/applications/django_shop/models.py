from django.db import models


class Note(models.Model):
    title = models.CharField(max_length=100)
    text = models.TextField(blank=True)
    attachment = models.FileField(upload_to="attachments", blank=True)
    made = models.DateTimeField(auto_now_add=True)

    def __str__(self):
        return self.title
