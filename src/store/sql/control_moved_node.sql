-- Of a node that is on another server than its timeline is of nothing is known.
-- $1 node  $2 server and database, or null
update shardmq_control.node
   set registration = gen_random_uuid(), system_identifier = null, timeline = null
 where node = $1 and system_identifier::text <> split_part($2::text, '/', 1)
