-- Which server a session is on, by the time of its start, and which backend serves it.
select pg_postmaster_start_time(), pg_backend_pid()
