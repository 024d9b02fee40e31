-- Gives up what all have read of the server's queue of notifications: otherwise only a LISTEN, UNLISTEN or NOTIFY
-- that ends well does, and where the queue is full none of these may come.
select pg_notification_queue_usage()
