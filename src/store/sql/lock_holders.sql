-- Who holds a lock that appends wait for: that of a partition, or one of a table of the schema that keeps rows
-- out; each with its transaction, by which one that lasts is told from the next one of the same session. What
-- this role may not see of a session is null, as is all of one whose transaction is prepared. A look at the
-- locks of the server, which are some hundred.
select case l.locktype when 'advisory' then 'partition ' || l.objid::bigint
            else 'table shardmq.' || c.relname end,
       l.pid, l.virtualtransaction::text, s.usename::text, s.application_name,
       host(s.client_addr),
       to_char(coalesce(s.xact_start, s.state_change) at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
  from pg_locks l
  left join pg_class c on l.locktype = 'relation' and c.oid = l.relation
                      and c.relnamespace = to_regnamespace('shardmq')
  left join pg_stat_activity s on s.pid = l.pid
 where l.granted
   and l.database = (select d.oid from pg_database d where d.datname = current_database())
   and (l.locktype = 'advisory' and l.classid = 1397247313 and l.objsubid = 2
        and l.objid::bigint between 10101 and 19999
        or c.relname is not null
        and l.mode in ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
   and l.pid is distinct from pg_backend_pid()
