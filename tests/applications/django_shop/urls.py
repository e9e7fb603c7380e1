from django.urls import path

from . import views

urlpatterns = [
    path("", views.page),
    path("hello/<str:name>/", views.hello, name="hello"),
    path("notes/", views.notes),
    path("upload/", views.upload),
    path("stream/", views.stream),
    path("download/", views.download),
    path("download-memory/", views.download_memory),
    path("visits/", views.visits),
    path("where/", views.where),
    path("body/", views.body),
    path("fail/", views.fail),
]
