"""Alembic's entry point; it runs on a connection that `kino_refunds.db.migrate` opened, and opens none itself."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table_schema="kino")
with context.begin_transaction():
    context.run_migrations()
